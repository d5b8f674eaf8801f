"""`AdapterMetadata`: all that a file says about its adapter beside its tensors, as JSON in its header."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import parse_json
from oft_diffusion.errors import AdapterFileError, OFTError

FORMAT_VERSION = 1
HEADER_KEY = "oft_diffusion"
_KINDS: Mapping[str, tuple[type, ...]] = {
    "base": (dict,),
    "trigger": (str, type(None)),
    "class_word": (str, type(None)),
    "training": (dict,),
    "software": (dict,),
    "created": (str,),
    "sha256": (str,),
    "probes": (dict,),
}


def has_trigger(prompt: str, trigger: str) -> bool:
    """Whether a prompt holds a trigger as a word of its own, in whatever case: CLIP's tokenizer lowers it."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", prompt, re.IGNORECASE) is not None


@dataclass(frozen=True)
class AdapterMetadata:
    """What a file says about its adapter.

    Attributes:
        components: each component's settings, block size resolved.
        base: what it was trained on, for example `{"name": ..., "components": {"unet": "UNet2DConditionModel"}}`.
        trigger: the trigger token, None where there is none.
        class_word: the subject's class, for example "mug".
        training: the training settings, plain JSON types.
        strength: what its author recommends.
        mode: how strengths are taken unless something else is asked for: "rotation", or "linear", as the tool takes
            them whose file it was.
        software: versions of what wrote the file; filled in on saving.
        created: ISO 8601 date and time, UTC; filled in on saving.
        sha256: of the tensors (`tensor_digest`); filled in on saving.
        probes: what `proof` computed when the file was written: by component and layer, "rotations" (filled in on
            saving), and "layers" and "weights" where the base was there.
        format_version: of this layout.
    """

    components: Mapping[str, OFTConfig]
    base: Mapping[str, Any] = field(default_factory=dict)
    trigger: str | None = None
    class_word: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    mode: Literal["rotation", "linear"] = "rotation"
    software: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    sha256: str = ""
    probes: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
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
        data = parse_json(text)
        data["components"] = {name: OFTConfig.from_dict(config) for name, config in data["components"].items()}
        metadata = cls(**data)
        wrong = [name for name, kinds in _KINDS.items() if not isinstance(getattr(metadata, name), kinds)]
        classes = {} if "base" in wrong else metadata.base.get("components", {})
        if not isinstance(classes, dict) or not all(isinstance(c, str) for c in classes.values()):
            wrong.append("base")
        prints = {} if "base" in wrong else metadata.base.get("fingerprints", {})
        if not isinstance(prints, dict) or not all(_is_fingerprint(p) for p in prints.values()):
            wrong.append("base")
        if "probes" not in wrong and not _are_probes(metadata.probes):
            wrong.append("probes")
        if not _is_number(metadata.strength):
            wrong.append("strength")
        if metadata.mode not in ("rotation", "linear"):
            wrong.append("mode")
        if not all(config.coft_eps is None or _is_number(config.coft_eps) for config in metadata.components.values()):
            wrong.append("coft_eps")
        if wrong:
            raise TypeError(f"not of the right type: {', '.join(wrong)}")
        return metadata


def _are_probes(found: Mapping[str, Any]) -> bool:
    if not all(isinstance(kind, dict) for kind in found.values()):
        return False
    parts = [part for kind in found.values() for part in kind.values()]
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(_is_number(value) for part in parts for value in part.values())


def _is_fingerprint(found: object) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("config", {}), dict):
        return False
    samples = found.get("samples")
    return isinstance(samples, list) and all(map(_is_sample, samples))


def _is_sample(found: object) -> bool:
    """Whether it is `[name, shape, dtype, place, number or None]`."""
    if not isinstance(found, list) or len(found) != 5:
        return False
    name, shape, dtype, place, value = found
    counts = [place, *shape] if isinstance(shape, list) else [None]
    is_told = (
        isinstance(name, str) and isinstance(dtype, str) and all(type(n) is int and 0 <= n < 2**63 for n in counts)
    )
    return is_told and (value is None or _is_number(value))


def _is_number(found: Any) -> bool:
    """Whether it is one that a float can hold: JSON has integers of any length, and Python's has NaN."""
    return type(found) in (int, float) and abs(found) <= sys.float_info.max


def public_name(base: str) -> str:
    """What files call a base: of a local path the last part alone, since where it lay is nobody's business.

    The shipped base, whose folder is called `weights`, is `pocket`, as on the command line.
    """
    local = Path(base)
    if local.parts[-3:] == ("oft_diffusion", "pocket", "weights"):
        return "pocket"
    return local.absolute().name if base and (local.is_absolute() or local.exists()) else base


def software_versions() -> dict[str, str]:
    """Versions of what an adapter's numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in ("oft-diffusion", "torch", "diffusers", "transformers", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def parse_metadata(file_name: str, header: Mapping[str, str]) -> AdapterMetadata:
    """The metadata in a file's header.

    Raises:
        AdapterFileError: there is none of ours, of a newer version, or broken.
    """
    text = header.get(HEADER_KEY)
    if text is None:
        raise AdapterFileError(
            f"{file_name} was written by another tool: its metadata says nothing of how its rotations are built",
            expected=f"metadata under {HEADER_KEY!r}",
            fix="load it with the tool that wrote it",
        )
    try:
        format_version = parse_json(text).get("format_version")
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            shown = type(format_version).__name__ if isinstance(format_version, (list, dict)) else format_version
            raise AdapterFileError(
                f"{file_name} has format version {shown}",
                expected=f"an integer from 1 to {FORMAT_VERSION}",
                fix="upgrade oft-diffusion",
            )
        return AdapterMetadata.from_json(text)
    except AdapterFileError:
        raise
    except OFTError as error:
        raise AdapterFileError(f"{file_name}: {error.problem}", expected=error.expected, fix=error.fix) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFileError(
            f"{file_name} has metadata that cannot be read ({str(error)[:200]})",
            expected=f"the JSON that oft-diffusion writes under {HEADER_KEY!r}",
            fix="get the file again, or ask its author to save it again",
        ) from error
