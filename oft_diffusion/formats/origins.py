"""The tools whose files are packed generators: what each file is known by, and how it is to be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oft_diffusion.errors import AdapterFileError
from oft_diffusion.formats.packed import MARKER, NEUMANN, Reading
from oft_diffusion.formats.source import Source
from oft_diffusion.plan import StrengthMode


@dataclass(frozen=True)
class Origin:
    """A tool.

    Attributes:
        name: for users.
        known_by: whether a file is its.
        reading: how that file is to be read.
        mode: how the tool takes strengths.
    """

    name: str
    known_by: Callable[[Source], bool]
    reading: Callable[[Source], Reading]
    mode: StrengthMode = "linear"


def _peft(source: Source) -> Reading:
    """Everything is told by its configuration; exact Cayley is the transpose of its own series."""
    config = source.config
    kind = str(config.get("peft_type", "OFT")).rpartition(".")[2]
    if kind != "OFT":
        raise AdapterFileError(
            f"{source.name} is {kind} of PEFT's", expected="OFT", fix="load it with PEFT, or train with OFT"
        )
    eps = _number(source, config.get("eps", 6e-5), "eps") if config.get("coft") else None
    told = Reading(NEUMANN, conv_sign=1.0, eps=eps, conv_eps=eps, kernels=False)
    if not config:
        note = f"{source.name} tells no series: five terms were taken, PEFT's default since 0.18"
        return replace(told, notes=(note,))
    if not config.get("use_cayley_neumann", True):
        return replace(told, settings={"parametrisation": "cayley"}, linear_sign=-1.0, conv_sign=-1.0)
    terms = int(_number(source, config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms"))
    return replace(told, settings=_series(source, terms, config.get("peft_version")))


def _series(source: Source, terms: int, version: object) -> dict[str, Any]:
    """PEFT's number of terms as our parametrisation and order."""
    if not 2 <= terms <= 33:
        raise AdapterFileError(
            f"{source.name} has num_cayley_neumann_terms={terms}", expected="2 to 33 terms", fix="get the file again"
        )
    if terms == 2 or not _since_018(version):
        return {"parametrisation": "cayley_series", "neumann_order": terms - 1}
    return {"parametrisation": "cayley_neumann", "neumann_order": max(terms, 4) - 1}  # its 3 terms are its 4


def _since_018(version: object) -> bool:
    """Of `0.21.2` or `0.18.0.dev0@<commit>`; the entry is newer than 0.17."""
    numbers = str(version or "0.0").partition("@")[0].split(".")[:2]
    return all(n.isdecimal() for n in numbers) and tuple(int(n) for n in numbers) >= (0, 18)


def _onetrainer(source: Source) -> Reading:
    # Until 2026-05 it bounded linear layers, by an entry that is there only if the user asked for it.
    told = source.arguments("ot_config")
    eps = _number(source, told.get("coft_eps", 1e-4), "coft_eps") if told.get("oft_coft") else None
    return Reading(NEUMANN, eps=eps)


def _sd_scripts(source: Source) -> Reading:
    told = source.arguments("ss_network_args")
    coft = str(told.get("oft_coft", told.get("coft", ""))).lower() in ("1", "true", "yes", "y", "on")
    eps = _number(source, told.get("coft_eps", 6e-5), "coft_eps") if coft else None
    return Reading(NEUMANN, eps=eps, conv_eps=eps)


def _musubi(source: Source) -> Reading:
    tensors = _settings(source, "oft_block_size_metadata")
    coft = _scalar(tensors.get("oft_coft_metadata", torch.zeros(()))) != 0.0
    told_eps = _scalar(tensors.get("coft_eps_metadata", torch.tensor(6e-5)))
    eps = _number(source, told_eps, "coft_eps") if coft else None

    def divided(own: Mapping[str, Tensor]) -> bool:
        told = own.get("scaled_oft_metadata")
        return MARKER in own if told is None else _scalar(told) != 0.0

    return Reading(NEUMANN, eps=eps, conv_eps=eps, divided=divided)


def _wan(source: Source) -> Reading:
    tensors = _settings(source, "oft_use_cayley_neumann_buffer")
    numbers = {name: _scalar(tensor) for name, tensor in tensors.items() if name.endswith("_buffer")}
    eps = None
    if numbers.get("oft_coft_buffer"):
        eps = _number(source, numbers.get("oft_coft_eps_buffer", 1e-4), "oft_coft_eps_buffer")
    if not numbers.get("oft_use_cayley_neumann_buffer", 1.0):
        return Reading({"parametrisation": "cayley"}, linear_sign=-1.0, conv_sign=1.0, eps=eps, conv_eps=eps)
    terms = _number(source, numbers.get("oft_num_cayley_neumann_terms_buffer", 5.0), "its number of terms")
    return Reading(_series(source, int(terms), "0.18"), eps=eps, conv_eps=eps)


def _unknown(source: Source) -> Reading:
    note = (
        f"{source.name} does not tell which tool wrote it: convolutions are read as OneTrainer, sd-scripts and ComfyUI "
        "take them, and the series as all tools take it"
    )
    return Reading(NEUMANN, notes=(note,))


def _settings(source: Source, suffix: str) -> Mapping[str, Tensor]:
    """The tensors of the first layer that tells its settings by tensors."""
    return next((tensors for tensors in source.groups.values() if suffix in tensors), {})


def _scalar(tensor: Tensor) -> float:
    """A setting that is told as a tensor; not a number where it has several."""
    return float(tensor) if tensor.numel() == 1 else math.nan


def _number(source: Source, value: object, what: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise AdapterFileError(
            f"{source.name} has {what}={value!r}", expected="a positive number", fix="get the file again"
        )
    return number


def _bare(source: Source) -> bool:
    """Whether keys are modules' own names, as PEFT and, through it, diffusers save them, and nothing says otherwise."""
    flat, dotted = (
        ("lora_", "oft_", "oftv2_", "lycoris_"),
        ("unet.", "transformer.", "text_encoder", "diffusion_model."),
    )
    named = any(key.startswith((*flat, *dotted, "clip_")) for key in source.groups)
    return not named and not source.has(MARKER) and not source.header.keys() - {"format"}


# In the order in which they are asked.
ORIGINS = (
    Origin("PEFT", lambda s: bool(s.config) or _bare(s), _peft),
    Origin("a WAN trainer", lambda s: s.has("oft_rotation.weight", "oft_use_cayley_neumann_buffer"), _wan),
    Origin("a musubi-tuner fork", lambda s: s.has("oft_block_size_metadata"), _musubi, mode="rotation"),
    Origin("sd-scripts", lambda s: s.header.get("ss_network_module") == "networks.oft_v2", _sd_scripts),
    Origin(
        "OneTrainer", lambda s: s.header.keys() & {"ot_branch", "ot_revision"} != set() or s.has(MARKER), _onetrainer
    ),
    Origin("an unknown tool", lambda s: True, _unknown),
)
