"""The tools whose files are packed generators: what each file is known by, and how it is to be read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from oft_diffusion.errors import AdapterFileError
from oft_diffusion.formats.live import EXPORT_KEY
from oft_diffusion.formats.packed import MARKER, NEUMANN, Reading, scalar
from oft_diffusion.formats.source import Source
from oft_diffusion.plan import StrengthMode


@dataclass(frozen=True)
class Origin:
    """A tool.

    Attributes:
        name: for users.
        known_by: whether a file is its.
        suffixes: all that its layers can have; anything else in its file would have a meaning that we do not know.
        reading: how that file is to be read.
        mode: how the tool takes strengths.
    """

    name: str
    known_by: Callable[[Source], bool]
    suffixes: frozenset[str]
    reading: Callable[[Source], Reading]
    mode: StrengthMode = "linear"


def origin_of(source: Source) -> Origin:
    """The tool that a file of packed generators is from.

    Raises:
        AdapterFileError: it has tensors that this tool does not write.
    """
    origin = next(origin for origin in ORIGINS if origin.known_by(source))
    for key, tensors in source.groups.items():
        if strange := tensors.keys() - origin.suffixes:
            raise AdapterFileError(
                f"{source.name} has {key}.{min(strange)}, whose meaning in a file of {origin.name} is not known",
                expected="settings of one tool",
                fix="get the file again from its author",
            )
    return origin


def _peft(source: Source) -> Reading:
    """Everything is told by its configuration; exact Cayley is the transpose of its own series."""
    config = source.config
    told_kind = config.get("peft_type", "OFT")
    kind = told_kind.rpartition(".")[2] if isinstance(told_kind, str) else "something else"
    if kind != "OFT":
        raise AdapterFileError(
            f"{source.name} is {kind} of PEFT's", expected="OFT", fix="load it with PEFT, or train with OFT"
        )
    told = Reading(
        NEUMANN,
        conv_sign=1.0,
        kernels=False,
        block_size=_block_size(source, config.get("oft_block_size")),
        block_share=_told_flag(source, config, "block_share"),
    )
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
    told = source.arguments("ot_config")
    if (kind := told.get("peft_type", "OFT_2")) != "OFT_2":
        raise _unusable(source, "peft_type", kind, "OFT_2, as its tensors are")
    marked = {MARKER in tensors for tensors in source.groups.values()}
    if len(marked) > 1:
        raise AdapterFileError(
            f"{source.name} has {MARKER} for some of its layers alone",
            expected="that marker for every layer or for none",
            fix="get the file again from its author",
        )
    if (scaled := _told_flag(source, told, "oft_scaled")) not in (None, *marked):
        found = "no " if scaled else ""
        raise _unusable(source, "oft_scaled", scaled, f"{not scaled}, its layers having {found}{MARKER}")
    # Until 2026-05 it bounded linear layers, by an entry that is there only if the user asked for it.
    coft = _flag(source, told.get("oft_coft", False), "oft_coft")
    revision = source.header.get("ot_revision", "")
    old = len(revision) >= 7 and any(commit.startswith(revision) for commit in _OLD_SERIES)
    return Reading(
        {"parametrisation": "cayley_series", "neumann_order": 4} if old else NEUMANN,
        eps=_number(source, told.get("coft_eps", 1e-4), "coft_eps") if coft else None,
        block_size=_block_size(source, told.get("oft_block_size")),
        block_share=_told_flag(source, told, "oft_block_share"),
    )


# All of OneTrainer's commits from OFT's first, of 14 November 2025, to the one that halved the last term, of the 16th.
_OLD_SERIES = (
    "1336b9b894dac621647c49118e58a4009fe3ecef",
    "607470f7e1eb4ab72720d1f9cd4225e9834937d7",
    "75ee0917cdcb88ead6402982c166a999eecf8721",
    "86ae381184dbffa5a261fc2427b1a439480aa9b8",
)


def _sd_scripts(source: Source) -> Reading:
    told = source.arguments("ss_network_args")
    eps = _number(source, told.get("coft_eps", 6e-5), "coft_eps") if _asks_for_coft(told) else None
    share = told.get("oft_block_share", told.get("block_share"))
    return Reading(NEUMANN, eps=eps, conv_eps=eps, block_share=None if share is None else _is_on(share))


def _asks_for_coft(told: Mapping[str, Any]) -> bool:
    """Whether sd-scripts' arguments, which are texts, ask for a bound."""
    return _is_on(told.get("oft_coft", told.get("coft", "")))


def _is_on(text: object) -> bool:
    return text is True or (isinstance(text, str) and text.lower() in ("1", "true", "yes", "y", "on"))


def _refuse_another_bound(source: Source) -> None:
    """Refuse a bound that the header asks for, of a file that is not known to be bounded so."""
    if _asks_for_coft(source.arguments("ss_network_args") | source.arguments("ot_config")):
        raise _unusable(source, "coft", True, "that from a tool whose bound is known: this one is not")


def _musubi(source: Source) -> Reading:
    coft = _flag(source, _setting(source, "oft_coft_metadata", 0.0), "oft_coft_metadata")
    eps = _number(source, _setting(source, "coft_eps_metadata", math.nan), "coft_eps_metadata") if coft else None
    if not coft:
        _refuse_another_bound(source)

    def divided(own: Mapping[str, Tensor]) -> bool:
        told = own.get("scaled_oft_metadata")
        return MARKER in own if told is None else _flag(source, scalar(told), "scaled_oft_metadata")

    return Reading(NEUMANN, eps=eps, conv_eps=eps, divided=divided)


def _wan(source: Source) -> Reading:
    coft = _flag(source, _setting(source, "oft_coft_buffer", 0.0), "oft_coft_buffer")
    eps = _number(source, _setting(source, "oft_coft_eps_buffer", math.nan), "oft_coft_eps_buffer") if coft else None
    if not coft:
        _refuse_another_bound(source)
    series = _setting(source, "oft_use_cayley_neumann_buffer", 1.0)
    if not _flag(source, series, "oft_use_cayley_neumann_buffer"):
        return Reading({"parametrisation": "cayley"}, linear_sign=-1.0, conv_sign=1.0, eps=eps, conv_eps=eps)
    terms = _setting(source, "oft_num_cayley_neumann_terms_buffer", 5.0)
    return Reading(_series(source, int(terms) if terms.is_integer() else terms, "0.18"), eps=eps, conv_eps=eps)


def _unknown(source: Source) -> Reading:
    """What all tools have in common; nothing where a file says, or may once have said, that it has more."""
    if source.header.keys() <= {"format"} and all(_OURS.match(key) for key in source.groups):
        raise AdapterFileError(
            f"{source.name} has the names of a file of oft-diffusion, or of diffusers' save_lora_weights, and no "
            "metadata at all",
            expected="a file that says how its rotations are built, or which tool wrote it",
            fix="save it again from diffusers with its settings (save_lora_weights(..., unet_lora_adapter_metadata="
            "unet.peft_config['default'].to_dict())), or get a file of oft-diffusion as it was saved",
        )
    _refuse_another_bound(source)
    note = (
        f"{source.name} does not tell which tool wrote it: convolutions are read as OneTrainer, sd-scripts and ComfyUI "
        "take them, and the series as all tools take it"
    )
    return Reading(NEUMANN, notes=(note,))


def _setting(source: Source, suffix: str, default: float) -> float:
    """A setting that every layer tells as a tensor, all of them the same, or none.

    Raises:
        AdapterFileError: they differ.
    """
    told = {scalar(tensors[suffix]) if suffix in tensors else None for tensors in source.groups.values()}
    if len(told) > 1:
        shown = ", ".join(sorted("none" if value is None else f"{value:g}" for value in told)[:3])
        raise _unusable(source, suffix, shown, "the same for every layer")
    value = told.pop()
    return default if value is None else value


def _flag(source: Source, value: object, what: str) -> bool:
    if value not in (0, 1) or not isinstance(value, (bool, float)):
        raise _unusable(source, what, value, "true or false")
    return bool(value)


def _told_flag(source: Source, told: Mapping[str, Any], entry: str) -> bool | None:
    return _flag(source, told[entry], entry) if entry in told else None


def _block_size(source: Source, value: object) -> int | None:
    """The block size that was asked for; None where it is 0, by which PEFT means that the number of blocks was."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _unusable(source, "oft_block_size", value, "a whole number")
    return value or None


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


def _is_for_onetrainer(source: Source) -> bool:
    """Whether it is what we write for OneTrainer, whose `ot_branch` and `ot_revision` are not ours to write."""
    return source.arguments(EXPORT_KEY).get("tool") == "onetrainer"


def _bare(source: Source) -> bool:
    """Whether keys are modules' own names, as PEFT and, through it, diffusers save them, and nothing says otherwise."""
    others = ("lora_", "oft_", "oftv2_", "lycoris_", "diffusion_model.", "text_encoders.", "clip_")
    named = any(key.startswith(others) or _OURS.match(key) for key in source.groups)
    return not named and not source.has(MARKER) and not source.header.keys() - {"format"}


_OURS = re.compile(r"(prior_)?(unet|transformer|prior|text_encoder)(_[0-9])?\.")  # how our names begin

_PACKED = frozenset({"oft_R.weight"})
_MUSUBI = frozenset(
    {"oft_block_size_metadata", "oft_block_share_metadata", "oft_coft_metadata", "coft_eps_metadata",
     "scaled_oft_metadata"}
)  # fmt: skip
_WAN = frozenset(
    {"oft_rotation.weight", "oft_block_size_buffer", "oft_rank_buffer", "oft_coft_buffer", "oft_coft_eps_buffer",
     "oft_block_share_buffer", "oft_use_cayley_neumann_buffer", "oft_num_cayley_neumann_terms_buffer"}
)  # fmt: skip

# In the order in which they are asked.
ORIGINS = (
    Origin("PEFT", lambda s: bool(s.config) or _bare(s), _PACKED, _peft),
    Origin("a WAN trainer", lambda s: s.has(*_WAN), _PACKED | _WAN, _wan),
    Origin(
        "a musubi-tuner fork", lambda s: s.has(*_MUSUBI), _PACKED | _MUSUBI | {MARKER, "alpha"}, _musubi, "rotation"
    ),
    Origin("sd-scripts", lambda s: s.header.get("ss_network_module") == "networks.oft_v2", _PACKED, _sd_scripts),
    Origin(
        "OneTrainer",
        lambda s: bool(s.header.keys() & {"ot_branch", "ot_revision"}) or s.has(MARKER) or _is_for_onetrainer(s),
        _PACKED | {MARKER},
        _onetrainer,
    ),
    Origin("an unknown tool", lambda s: True, _PACKED, _unknown),
)
