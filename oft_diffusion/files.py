"""Adapter files: one safetensors file with all components' tensors, and everything about them in its metadata.

Tensor names are `<component>.<layer>.oft_R.weight` with PEFT's packing, so the tensors are readable by anyone who
knows PEFT's. The header's one JSON entry, `oft_diffusion`, holds the rest (`AdapterMetadata`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterFileError, OFTError
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.rotation import block_size_of

FORMAT_VERSION = 1
FILE_NAME = "oft_adapter.safetensors"
HEADER_KEY = "oft_diffusion"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_KINDS: Mapping[str, tuple[type, ...]] = {
    "base": (dict,),
    "trigger": (str, type(None)),
    "class_word": (str, type(None)),
    "training": (dict,),
    "software": (dict,),
    "created": (str,),
    "sha256": (str,),
}
_MAX_HEADER_BYTES = 25_000_000  # safetensors' own limit is 100 MB; an adapter of 10,000 layers needs 2


@dataclass(frozen=True)
class AdapterMetadata:
    """What a file says about its adapter.

    Attributes:
        components: each component's settings, block size resolved.
        base: what it was trained on, for example `{"name": ..., "components": {"unet": "UNet2DConditionModel"}}`.
        trigger: the trigger token, None where there is none.
        class_word: the subject's class, for example "mug".
        training: the training settings, plain JSON types.
        software: versions of what wrote the file; filled in on saving.
        created: ISO 8601 date and time, UTC; filled in on saving.
        sha256: of the tensors (`tensor_digest`); filled in on saving.
        format_version: of this layout.
    """

    components: Mapping[str, OFTConfig]
    base: Mapping[str, Any] = field(default_factory=dict)
    trigger: str | None = None
    class_word: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    sha256: str = ""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """One line of JSON; `from_json` inverts it."""
        data = {k: v for k, v in self.__dict__.items() if k != "components"}
        data["components"] = {name: config.to_dict() for name, config in self.components.items()}
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdapterMetadata:
        """Parse `to_json`'s output.

        Raises:
            ValueError, TypeError, KeyError, OFTError: it is not such output.
        """
        data = json.loads(text)
        data["components"] = {name: OFTConfig.from_dict(config) for name, config in data["components"].items()}
        metadata = cls(**data)
        wrong = [name for name, kinds in _KINDS.items() if not isinstance(getattr(metadata, name), kinds)]
        classes = {} if "base" in wrong else metadata.base.get("components", {})
        if not isinstance(classes, dict) or not all(isinstance(c, str) for c in classes.values()):
            wrong.append("base")
        if wrong:
            raise TypeError(f"not of the right type: {', '.join(wrong)}")
        return metadata


@dataclass(frozen=True)
class AdapterFile:
    """A file in memory: per component, `<layer>.oft_R.weight` to `(r, b(b-1)/2)` on the CPU; and the metadata."""

    path: Path
    components: Mapping[str, Mapping[str, Tensor]]
    metadata: AdapterMetadata


def save_adapter_file(
    path: str | Path, components: Mapping[str, Mapping[str, Tensor]], metadata: AdapterMetadata
) -> Path:
    """Write an adapter file, whole or not at all.

    Args:
        path: the file, or a folder, in which it is called `oft_adapter.safetensors`. Folders are created.
        components: per component (`unet`, `text_encoder`, ...), tensors as `oft_state_dict` returns them.
        metadata: software versions, date and digest are filled in here.

    Returns:
        The file's path.

    Raises:
        AdapterFileError: a tensor is not finite or misshapen, the metadata's components are not the tensors', or the
            file cannot be written.
    """
    path = _file_to_write(Path(path))
    tensors = {f"{part}.{name}": t.contiguous() for part, state in components.items() for name, t in state.items()}
    _check_tensors(path, tensors)
    _check_settings(path, {part: state for part, state in components.items() if state}, metadata)
    filled = AdapterMetadata(**{
        **metadata.__dict__,
        "software": software_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sha256": tensor_digest(tensors),
        "format_version": FORMAT_VERSION,
    })  # fmt: skip
    write_atomically(path, save(tensors, metadata={"format": "pt", HEADER_KEY: filled.to_json()}))
    return path


def _file_to_write(path: Path) -> Path:
    if path.suffix.lower() in PICKLES:
        raise AdapterFileError(
            f"{path.name} would be a pickle by its name",
            expected="a name that ends in .safetensors, or a folder",
            fix=f"use {path.with_suffix('.safetensors').name}",
        )
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def load_adapter_file(path: str | Path) -> AdapterFile:
    """Read and check an adapter file, or the one in a folder.

    Raises:
        AdapterFileError: it is missing, truncated, corrupt or not an OFT adapter; its tensors are misshapen, of a
            wrong dtype or not finite; or they are not those that its digest was taken of.
    """
    path = resolve_adapter_path(path)
    tensors, header = _read(path)
    _check_tensors(path, tensors)
    metadata = _parse_metadata(path, header)
    if tensor_digest(tensors) != metadata.sha256:
        raise AdapterFileError(
            f"{path.name}: the tensors' SHA-256 is not the one in its metadata",
            expected="an unaltered file",
            fix="download or copy the file again",
        )
    components: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        components.setdefault(component, {})[name] = tensor
    _check_settings(path, components, metadata)
    return AdapterFile(path, components, metadata)


def resolve_adapter_path(path: str | Path, weight_name: str | None = None) -> Path:
    """The adapter file that a path to a file or folder means.

    Raises:
        AdapterFileError: there is none, or it is not a safetensors file.
    """
    path = Path(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name too long, a folder that may not be searched
        raise AdapterFileError(
            f"{path} cannot be reached ({error.strerror or error})",
            expected="an adapter file or folder",
            fix="check the path and its permissions",
        ) from error
    if is_folder:
        inside = path / (weight_name or FILE_NAME)
        if not inside.is_file():
            others = sorted(p.name for p in path.glob("*.safetensors"))
            raise AdapterFileError(
                f"folder {path} holds no {inside.name}",
                expected=f"an adapter file; found {', '.join(others) or 'no .safetensors file'}",
                fix="name the file with weight_name, or pass its path",
            )
        path = inside
    if not exists:
        raise AdapterFileError(f"{path} does not exist", expected="an adapter file or folder", fix="check the path")
    if not path.is_file() or path.suffix != ".safetensors":
        raise AdapterFileError(
            f"{path.name} is no safetensors file",
            expected="a .safetensors file; pickled formats (.pt, .bin, .ckpt) can run code and are never loaded",
            fix="convert it with the tool that wrote it",
        )
    return path


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, or it can be made. Nothing is made here."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a temporary name beside it, synced, then renamed.

    Raises:
        AdapterFileError: the folder cannot be made or written, or the disk is full.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a shared adapter gets the usual permissions instead.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be written ({error.strerror or error})",
            expected=f"a writable folder with {len(data) / 1e6:.1f} MB free",
            fix="free some space, or choose another folder",
        ) from error
    finally:
        if temporary is not None:  # Ctrl-C leaves nothing behind either
            Path(temporary).unlink(missing_ok=True)


def software_versions() -> dict[str, str]:
    """Versions of what an adapter's numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in ("oft-diffusion", "torch", "diffusers", "transformers", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise AdapterFileError(
                f"{path.name} claims a header of {header_bytes:,} bytes",
                expected=f"at most {_MAX_HEADER_BYTES:,} bytes",
                fix="do not trust this file; get it again from its author",
            )
        with safe_open(path, framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            foreign = [key for key in file.keys() if not key.endswith(KEY_SUFFIX)]  # noqa: SIM118 - not a mapping
            if foreign or not file.keys():
                raise _not_ours(path, foreign)
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, OFTError):
            raise
        raise AdapterFileError(
            f"{path.name} is truncated or corrupt ({str(error)[:200]})",
            expected="a whole safetensors file",
            fix="download or copy the file again",
        ) from error


def _not_ours(path: Path, foreign: list[str]) -> AdapterFileError:
    found = f"tensors such as {foreign[0]}" if foreign else "no tensors at all"
    kind = " (this looks like a LoRA: load it with diffusers' load_lora_weights)" if "lora" in found else ""
    return AdapterFileError(
        f"{path.name} is no OFT adapter: it has {found}{kind}",
        expected=f"tensors named <component>.<layer>{KEY_SUFFIX}",
        fix="check that this is an oft-diffusion file",
    )


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    problems = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            problems.append(f"{name} is {tensor.dtype}, not a floating dtype")
        elif tensor.dim() != 2 or block_size_of(tensor.shape[1]) is None or tensor.shape[0] == 0:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not (blocks, b(b-1)/2)")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise AdapterFileError(
            f"{path.name} has {len(problems)} unusable tensor(s): {'; '.join(problems[:3])}"
            + ("; ..." if len(problems) > 3 else ""),
            expected="finite floating generators",
            fix="use an earlier checkpoint; this one is broken",
        )


def _check_settings(path: Path, components: Mapping[str, Mapping[str, Tensor]], metadata: AdapterMetadata) -> None:
    configs = metadata.components
    if not components or set(components) != set(configs):
        raise AdapterFileError(
            f"{path.name} has tensors for {', '.join(sorted(components)) or 'nothing'} but settings for "
            f"{', '.join(sorted(configs)) or 'nothing'}",
            expected="settings for each adapted component",
            fix="get the file again, or ask its author to save it again",
        )
    for part, state in components.items():
        sizes = sorted({block_size_of(t.shape[1]) or 0 for t in state.values()})
        if sizes != [configs[part].block_size]:
            raise AdapterFileError(
                f"{path.name} has {part} blocks of size {', '.join(map(str, sizes))}, but its settings say "
                f"{configs[part].block_size}",
                expected="one block size per component, the one in its settings",
                fix="get the file again, or ask its author to save it again",
            )


def _parse_metadata(path: Path, header: Mapping[str, str]) -> AdapterMetadata:
    text = header.get(HEADER_KEY)
    if text is None:
        raise AdapterFileError(
            f"{path.name} was written by another tool: its metadata says nothing of how its rotations are built",
            expected=f"metadata under {HEADER_KEY!r}",
            fix="load it with the tool that wrote it",
        )
    try:
        format_version = json.loads(text).get("format_version")
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise AdapterFileError(
                f"{path.name} has format version {format_version}",
                expected=f"an integer from 1 to {FORMAT_VERSION}",
                fix="upgrade oft-diffusion",
            )
        return AdapterMetadata.from_json(text)
    except AdapterFileError:
        raise
    except OFTError as error:
        raise AdapterFileError(f"{path.name}: {error.problem}", expected=error.expected, fix=error.fix) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterFileError(
            f"{path.name} has metadata that cannot be read ({str(error)[:200]})",
            expected=f"the JSON that oft-diffusion writes under {HEADER_KEY!r}",
            fix="get the file again, or ask its author to save it again",
        ) from error
