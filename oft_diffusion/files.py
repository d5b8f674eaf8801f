"""Adapter files: one safetensors file with all components' tensors, and everything about them in its metadata.

Tensor names are `<component>.<layer>.oft_R.weight` with PEFT's packing, so the tensors are readable by anyone who
knows PEFT's. The header's one JSON entry, `oft_diffusion`, holds the rest (`AdapterMetadata`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from oft_diffusion.disk import (
    SEAL_KEY,
    check_header,
    is_sealed,
    read_safetensors,
    sealed,
    tensor_digest,
    write_atomically,
)
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.inject import KEY_SUFFIX, SCALE_SUFFIX
from oft_diffusion.metadata import FORMAT_VERSION, HEADER_KEY, AdapterMetadata, parse_metadata, software_versions
from oft_diffusion.proof import differing, rotation_probes
from oft_diffusion.rotation import block_size_of

FILE_NAME = "oft_adapter.safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    # Copies: safetensors refuses tensors that share memory.
    tensors = {f"{p}.{name}": t.detach().clone().contiguous() for p, s in components.items() for name, t in s.items()}
    _check_tensors(path, tensors)
    _check_settings(path, {part: state for part, state in components.items() if state}, metadata)
    filled = AdapterMetadata(**{
        **metadata.__dict__,
        "software": software_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sha256": tensor_digest(tensors),
        "probes": {**metadata.probes, "rotations": {
            part: rotation_probes(state, metadata.components[part]) for part, state in components.items() if state
        }},
        "format_version": FORMAT_VERSION,
    })  # fmt: skip
    header = {"format": "pt", HEADER_KEY: filled.to_json(), SEAL_KEY: "0" * 64}
    data = sealed(save(tensors, metadata=header))
    _check_loadable(path, data)
    write_atomically(path, data)
    return path


def _check_loadable(path: Path, data: bytes) -> None:
    try:
        check_header(path, data)
    except AdapterFileError as error:
        raise AdapterFileError(
            f"{path.name} could not be loaded again: {error.problem}",
            expected=error.expected,
            fix="adapt fewer layers, or keep less beside the adapter (training, base)",
        ) from error


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
            wrong dtype or not finite; or any bit of it is another than when it was written.
    """
    path = resolve_adapter_path(path)
    tensors, header = read_safetensors(path, lambda names: _check_names(path, names))
    _check_tensors(path, tensors)
    metadata = parse_metadata(path.name, header)
    if tensor_digest(tensors) != metadata.sha256:
        raise AdapterFileError(
            f"{path.name}: the tensors' SHA-256 is not the one in its metadata",
            expected="an unaltered file",
            fix="download or copy the file again",
        )
    if not is_sealed(path):
        raise AdapterFileError(
            f"{path.name}: its SHA-256 is not the one in its header; something beside the tensors was changed",
            expected="an unaltered file",
            fix="download or copy the file again",
        )
    components: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        components.setdefault(component, {})[name] = tensor
    _check_settings(path, components, metadata)
    _check_probes(path, components, metadata)
    return AdapterFile(path, components, metadata)


def resolve_adapter_path(path: str | Path, weight_name: str | None = None) -> Path:
    """The adapter file that a path to a file or folder means: in a folder `weight_name`, ours, or the only one.

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
        there = sorted(p.name for p in path.glob("*.safetensors"))
        inside = path / (weight_name or (there[0] if len(there) == 1 else FILE_NAME))
        if not inside.is_file():
            raise AdapterFileError(
                f"folder {path} holds no {inside.name}",
                expected=f"an adapter file; found {', '.join(there) or 'no .safetensors file'}",
                fix="name the file with weight_name, or pass its path",
            )
        path = inside
    elif exists and weight_name not in (None, path.name):
        raise AdapterFileError(
            f"{path} is a file, and weight_name={weight_name!r} another",
            expected="weight_name beside a folder or a hub repository",
            fix="leave weight_name out, or pass the folder",
        )
    if not exists:
        raise AdapterFileError(f"{path} does not exist", expected="an adapter file or folder", fix="check the path")
    if not path.is_file() or path.suffix != ".safetensors":
        raise AdapterFileError(
            f"{path.name} is no safetensors file",
            expected="a .safetensors file; pickled formats (.pt, .bin, .ckpt) can run code and are never loaded",
            fix="convert it with the tool that wrote it",
        )
    return path


def _check_names(path: Path, names: Sequence[str]) -> None:
    foreign = [name for name in names if not name.endswith((KEY_SUFFIX, SCALE_SUFFIX))]
    if not foreign and names:
        return
    found = f"tensors such as {foreign[0]}" if foreign else "no tensors at all"
    kind = " (this looks like a LoRA: load it with diffusers' load_lora_weights)" if "lora" in found else ""
    raise AdapterFileError(
        f"{path.name} is no OFT adapter: it has {found}{kind}",
        expected=f"tensors named <component>.<layer>{KEY_SUFFIX}",
        fix="check that this is an oft-diffusion file",
    )


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    problems = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            problems.append(f"{name} is {tensor.dtype}, not a floating dtype")
        elif tensor.dim() != 2 or 0 in tensor.shape or _no_block(name, tensor.shape[1]):
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not (blocks, b(b-1)/2)")
        elif not torch.isfinite(tensor.float()).all():  # in float32, as they act
            problems.append(f"{name} has values that are not finite")
        elif name.endswith(SCALE_SUFFIX) and not _fits_generator(name, tensors):
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not that of rotated outputs")
    if problems:
        raise AdapterFileError(
            f"{path.name} has {len(problems)} unusable tensor(s): {'; '.join(problems[:3])}"
            + ("; ..." if len(problems) > 3 else ""),
            expected="finite floating generators",
            fix="use an earlier checkpoint; this one is broken",
        )


def _no_block(name: str, columns: int) -> bool:
    return name.endswith(KEY_SUFFIX) and block_size_of(columns) is None


def _fits_generator(name: str, tensors: Mapping[str, Tensor]) -> bool:
    generator = tensors.get(name.removesuffix(SCALE_SUFFIX) + KEY_SUFFIX)
    if generator is None or generator.dim() != 2:
        return False
    return tuple(tensors[name].shape) == (len(generator), block_size_of(generator.shape[1]))


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
        sizes = sorted({block_size_of(t.shape[1]) or 0 for key, t in state.items() if key.endswith(KEY_SUFFIX)})
        if sizes != [configs[part].block_size] and not (sizes and configs[part].block_size == "mixed"):
            raise AdapterFileError(
                f"{path.name} has {part} blocks of size {', '.join(map(str, sizes))}, but its settings say "
                f"{configs[part].block_size}",
                expected='one block size per component, the one in its settings, or "mixed" there',
                fix="get the file again, or ask its author to save it again",
            )


def _check_probes(path: Path, components: Mapping[str, Mapping[str, Tensor]], metadata: AdapterMetadata) -> None:
    for part, known in metadata.probes.get("rotations", {}).items():
        if part not in components:
            continue
        here = rotation_probes(components[part], metadata.components[part])
        if wrong := differing(known, here):
            raise AdapterFileError(
                f"{path.name}: {len(wrong)} rotations of {part} are not those that were saved: {', '.join(wrong[:3])}",
                expected="the same packing, sign and series as when it was written",
                fix="get the file again; if it is sound, this version of oft-diffusion has a bug",
            )
