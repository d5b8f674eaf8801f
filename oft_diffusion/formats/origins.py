"""The tools whose files are packed generators: what each file is known by, and how it is to be read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

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
    told_kind = config.get("peft_type", "OFT")
    kind = told_kind.rpartition(".")[2] if isinstance(told_kind, str) else "something else"
    if kind != "OFT":
        raise AdapterFileError(
            f"{source.name} is {kind} of PEFT's", expected="OFT", fix="load it with PEFT, or train with OFT"
        )
    _refuse_scaled(source, "PEFT")
    told = Reading(NEUMANN, conv_sign=1.0, kernels=False)
    if not config:
        note = f"{source.name} tells no series: five terms were taken, PEFT's default since 0.18"
        return replace(told, notes=(note,))
    # PEFT writes all of its settings; one that is missing was damaged, or belongs to something else.
    if _flag(source, config.get("coft"), "coft"):
        eps = _number(source, config.get("eps"), "eps")
        told = replace(told, eps=eps, conv_eps=eps)
    if not _flag(source, config.get("use_cayley_neumann"), "use_cayley_neumann"):
        return replace(told, settings={"parametrisation": "cayley"}, linear_sign=-1.0, conv_sign=-1.0)
    terms = config.get("num_cayley_neumann_terms")
    return replace(told, settings=_series(source, terms, config.get("peft_version")))


def _series(source: Source, terms: object, version: object) -> dict[str, Any]:
    """PEFT's number of terms as our parametrisation and order."""
    if not isinstance(terms, int) or not 2 <= terms <= 33:
        raise _unusable(source, "num_cayley_neumann_terms", terms, "a whole number from 2 to 33")
    if terms == 2 or not _since_018(source, version):
        return {"parametrisation": "cayley_series", "neumann_order": terms - 1}
    return {"parametrisation": "cayley_neumann", "neumann_order": max(terms, 4) - 1}  # its 3 terms are its 4


def _since_018(source: Source, version: object) -> bool:
    """Of `0.21.2` or `0.18.0.dev0@<commit>`; the entry is newer than 0.17."""
    if version is None:
        return False
    numbers = re.match(r"([0-9]{1,4})\.([0-9]{1,4})(?![0-9])", version) if isinstance(version, str) else None
    if numbers is None:
        raise _unusable(source, "peft_version", version, "a version, such as 0.18.0")
    return (int(numbers[1]), int(numbers[2])) >= (0, 18)


def _onetrainer(source: Source) -> Reading:
    # Until 2026-05 it bounded linear layers, by an entry that is there only if the user asked for it.
    told = source.arguments("ot_config")
    coft = _flag(source, told.get("oft_coft", False), "oft_coft")
    return Reading(NEUMANN, eps=_number(source, told.get("coft_eps", 1e-4), "coft_eps") if coft else None)


def _sd_scripts(source: Source) -> Reading:
    _refuse_scaled(source, "sd-scripts")
    told = source.arguments("ss_network_args")
    eps = _number(source, told.get("coft_eps", 6e-5), "coft_eps") if _asks_for_coft(told) else None
    return Reading(NEUMANN, eps=eps, conv_eps=eps)


def _asks_for_coft(told: Mapping[str, Any]) -> bool:
    """Whether sd-scripts' arguments, which are texts, ask for a bound."""
    coft = told.get("oft_coft", told.get("coft", ""))
    return coft is True or (isinstance(coft, str) and coft.lower() in ("1", "true", "yes", "y", "on"))


def _musubi(source: Source) -> Reading:
    coft = _flag(source, _setting(source, "oft_coft_metadata", 0.0), "oft_coft_metadata")
    eps = _number(source, _setting(source, "coft_eps_metadata", 6e-5), "coft_eps_metadata") if coft else None

    def divided(own: Mapping[str, Tensor]) -> bool:
        told = own.get("scaled_oft_metadata")
        return MARKER in own if told is None else _flag(source, _scalar(told), "scaled_oft_metadata")

    return Reading(NEUMANN, eps=eps, conv_eps=eps, divided=divided)


def _wan(source: Source) -> Reading:
    _refuse_scaled(source, "a WAN trainer")
    coft = _flag(source, _setting(source, "oft_coft_buffer", 0.0), "oft_coft_buffer")
    eps = _number(source, _setting(source, "oft_coft_eps_buffer", 1e-4), "oft_coft_eps_buffer") if coft else None
    series = _setting(source, "oft_use_cayley_neumann_buffer", 1.0)
    if not _flag(source, series, "oft_use_cayley_neumann_buffer"):
        return Reading({"parametrisation": "cayley"}, linear_sign=-1.0, conv_sign=1.0, eps=eps, conv_eps=eps)
    terms = _setting(source, "oft_num_cayley_neumann_terms_buffer", 5.0)
    return Reading(_series(source, int(terms) if terms.is_integer() else terms, "0.18"), eps=eps, conv_eps=eps)


def _unknown(source: Source) -> Reading:
    """What all tools have in common; nothing where a file says, or may once have said, that it has more."""
    if source.header.keys() <= {"format"} and all(key.startswith(_OURS) for key in source.groups):
        raise AdapterFileError(
            f"{source.name} has the names of a file of oft-diffusion, and no metadata at all",
            expected="a file that says how its rotations are built, or which tool wrote it",
            fix="get the file as its tool saved it: it was saved again without its header",
        )
    if _asks_for_coft(source.arguments("ss_network_args") | source.arguments("ot_config")):
        raise _unusable(source, "coft", True, "that from a tool whose bound is known: this one is not")
    note = (
        f"{source.name} does not tell which tool wrote it: convolutions are read as OneTrainer, sd-scripts and ComfyUI "
        "take them, and the series as all tools take it"
    )
    return Reading(NEUMANN, notes=(note,))


def _refuse_scaled(source: Source, tool: str) -> None:
    """Refuse the marker of another tool, whose scale this one would not know of."""
    if source.has(MARKER):
        raise AdapterFileError(
            f"{source.name} is a file of {tool}, but has {MARKER}, a marker of OneTrainer",
            expected="settings of one tool",
            fix="get the file again from its author",
        )


def _setting(source: Source, suffix: str, default: float) -> float:
    """A setting that every layer tells as a tensor, all of them the same, or none.

    Raises:
        AdapterFileError: they differ.
    """
    told = {_scalar(tensors[suffix]) if suffix in tensors else None for tensors in source.groups.values()}
    if len(told) > 1:
        shown = ", ".join(sorted("none" if value is None else f"{value:g}" for value in told)[:3])
        raise _unusable(source, suffix, shown, "the same for every layer")
    value = told.pop()
    return default if value is None else value


def _scalar(tensor: Tensor) -> float:
    """A setting that is told as a tensor; infinite, which none may be, where it has several numbers."""
    return float(tensor) if tensor.numel() == 1 else math.inf


def _flag(source: Source, value: object, what: str) -> bool:
    if value not in (0, 1) or not isinstance(value, (bool, float)):
        raise _unusable(source, what, value, "true or false")
    return bool(value)


def _number(source: Source, value: object, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise _unusable(source, what, value, "a positive number")
    return number


def _unusable(source: Source, what: str, value: object, expected: str) -> AdapterFileError:
    shown = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)  # nested without end
    return AdapterFileError(
        f"{source.name} has {what}={shown}", expected=expected, fix="get the file, and what lies beside it, again"
    )


def _bare(source: Source) -> bool:
    """Whether keys are modules' own names, as PEFT and, through it, diffusers save them, and nothing says otherwise."""
    flat, dotted = (
        ("lora_", "oft_", "oftv2_", "lycoris_"),
        ("unet.", "transformer.", "text_encoder", "diffusion_model."),
    )
    named = any(key.startswith((*flat, *dotted, "clip_")) for key in source.groups)
    return not named and not source.has(MARKER) and not source.header.keys() - {"format"}


_OURS = ("unet.", "transformer", "prior.", "text_encoder")  # how our names begin

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
