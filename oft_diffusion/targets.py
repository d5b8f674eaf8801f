"""Finding the layers to adapt: by an architecture's row, by a rule where there is none, or by a user's pattern.

Patterns are regular expressions matched against whole layer names.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from oft_diffusion.architectures import DENOISERS, TARGET_SETS, Architecture
from oft_diffusion.errors import TargetError
from oft_diffusion.text_encoders import TEXT_ENCODERS

_LINEAR_SETS = TARGET_SETS[:-1]  # these leave convolutions alone, even where a pattern of theirs meets one

ARCHITECTURES: dict[str, Architecture] = {**DENOISERS, **TEXT_ENCODERS}

# What the rule for architectures without a row takes, inside repeated blocks.
_ATTENTION_LAYER = re.compile(
    r"(to_)?(q|k|v|o|out|query|key|value)(_proj|_t)?|\w*qkv\w*|\w*(kv|query_key_value)(_proj)?|add_[qkv]_proj|"
    r"to_add_out|to_gate|out_layer|(\w*attn_)?proj|proj_attn|dense|c_attn"
)
_ATTENTION_PART = re.compile(r"attn|attention", re.IGNORECASE)
_MLP_PART = re.compile(r"(^|_)(mlp|ff|ffn|feed_?forward)($|_)|DenseReluDense", re.IGNORECASE)
_NEVER = re.compile(
    r"embed|(^|[._])emb($|[._])|time_|norm|modulation|(^|[._])mod($|[._])|adaln|(?<!noise_)refiner|router|"
    r"(^|\.)(gate|experts?|visual)($|\.)|vision|image_encoder|lm_head|(^|[._])head($|\.)",
    re.IGNORECASE,
)

# Projections that `share_qkv` may tie: `to_q`, `add_k_proj`, `v_proj`, `query`, `to_q_t`, ...; of one stream and kind.
_PROJECTION = re.compile(r"(?P<stream>(to_|add_)?)(?P<role>q|k|v|query|key|value)(?P<kind>_proj|_proj_cam|_t|_img)?")
_CROSS_ATTENTION = re.compile(r"cross|attn2$|_to_(video|audio)_")

# Names of layers that other adapters put inside a target; never targets themselves.
_FOREIGN = re.compile(r"(^|\.)(lora_[A-Za-z_]+|oft_[A-Za-z_]+)(\.|$)")


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its name as files spell it, its module, and the size of the axis that is rotated.

    That axis is a linear layer's input features, or a convolution's input channels.
    """

    name: str
    module: nn.Module
    in_features: int


def find_targets(model: nn.Module, targets: str | tuple[str, ...], *, hidden_state: int = -1) -> list[Target]:
    """The layers of `model` that `targets` names, in the model's own order.

    A set's name leaves out layers of the last block that a denoiser throws away. On an architecture without a row it
    means what the names say, inside repeated blocks, and a warning says so.

    Args:
        model: a diffusers or transformers component, or any module.
        targets: a set's name (`TARGET_SETS`), one regular expression, or several.
        hidden_state: for a text encoder, the last hidden state that its pipeline takes (`last_hidden_state`); layers
            behind it are left out.

    Raises:
        TargetError: nothing matched; projections are fused; a pattern is no regular expression; a matched layer is no
            linear layer.
    """
    row = architecture_of(model)
    patterns = _compile(_resolve(model, row, targets))
    _refuse_fused(model)
    unused = _unused(model, row, hidden_state, drop_idle=targets in TARGET_SETS)
    found: list[Target] = []
    for raw_name, module in model.named_modules():
        name = normalise_name(raw_name)
        if name in unused or _FOREIGN.search(raw_name) or not any(p.fullmatch(name) for p in patterns):
            continue
        if hasattr(module, "base_layer"):  # another adapter's wrapper: the layer inside is visited under the same name
            continue
        width = _input_width(module)
        if width is not None and (_is_linear(module) or targets not in _LINEAR_SETS):
            found.append(Target(name, module, width))
        elif width is None and _is_weighted_leaf(module) and targets not in TARGET_SETS:
            grouped = isinstance(module, nn.Conv2d)
            raise TargetError(
                f"layer {name} of {type(model).__name__} is a {type(module).__name__}"
                f"{f' of {module.groups} groups' if grouped else ''}, which OFT does not adapt",
                expected="linear layers (modules with in_features), or Conv2d of one group",
                fix="narrow the pattern so that it matches these only",
            )
    if not found:
        raise TargetError(
            f"targets={_shown(targets)} match no layer of {type(model).__name__}",
            expected=f"at least one layer; this model has {_examples(model)}",
            fix=_spelled_out(model, patterns) or "pass a regular expression that matches whole layer names",
        )
    return found


def find_layers(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """The layers of `model` of these very names, in the model's own order, with or without `text_model.`.

    Raises:
        TargetError: there is no such layer that OFT adapts; projections are fused.
    """
    wanted = {canonical_name(name): name for name in names}
    _refuse_fused(model)
    found: list[Target] = []
    for raw_name, module in model.named_modules():
        name = normalise_name(raw_name)
        width = None if hasattr(module, "base_layer") or _FOREIGN.search(raw_name) else _input_width(module)
        if width is not None and wanted.pop(canonical_name(name), None) is not None:
            found.append(Target(name, module, width))
    if wanted or not found:
        shown = "; ".join(sorted(wanted.values())[:3]) + ("; ..." if len(wanted) > 3 else "")
        raise TargetError(
            f"{len(wanted)} of {len(wanted) + len(found)} layers match no layer to adapt in {type(model).__name__}: "
            f"{shown or '(none is named)'}",
            expected=f"names of its layers; it has {_examples(model)}",
            fix="use the architecture that these layers belong to",
        )
    return found


def layer_names(model: nn.Module) -> frozenset[str]:
    """Canonical names of all layers that OFT can adapt."""
    named = (
        (name, m) for name, m in model.named_modules() if not hasattr(m, "base_layer") and not _FOREIGN.search(name)
    )
    return frozenset(canonical_name(normalise_name(name)) for name, m in named if _input_width(m) is not None)


def tied_projections(model: nn.Module, found: Iterable[Target]) -> dict[str, str]:
    """Which layers `OFTConfig.share_qkv` gives the generator of another: each by name, with that other's name.

    Of each group of one input that is among the targets, the first in the model's order keeps the generator.
    """
    groups = projections_of_one_input(model, found)
    return {name: first for first, *others in groups for name in others}


def projections_of_one_input(model: nn.Module, found: Iterable[Target]) -> list[list[str]]:
    """Names of the targets that read the same tensor, by attention: k and v, and q, except in cross-attention."""
    parents = {normalise_name(name): module for name, module in model.named_modules()}
    groups: dict[tuple[str, str, str, bool, int], list[str]] = {}
    for target in found:
        parent, _, leaf = target.name.rpartition(".")
        projection = _PROJECTION.fullmatch(leaf)
        if projection is not None:
            apart = projection["role"][0] == "q" and _is_cross_attention(parent, parents[parent])
            key = (parent, projection["stream"], projection["kind"] or "", apart, target.in_features)
            groups.setdefault(key, []).append(target.name)
    return list(groups.values())


def choose_block_size(found: Iterable[Target], block_size: int | Literal["auto", "mixed"]) -> int:
    """The block size to use; "auto" is the largest of 64, 32 and 16 that divides every target.

    Raises:
        TargetError: some target's in_features is not divisible. Sizes are never adjusted in silence.
    """
    assert block_size != "mixed"  # of files, which tell each layer's
    found = list(found)
    sizes = sorted({t.in_features for t in found})
    fitting = [b for b in (128, 64, 32, 16, 8, 4, 2) if all(size % b == 0 for size in sizes)]
    if block_size == "auto":
        if fits := [b for b in (64, 32, 16) if b in fitting]:
            return fits[0]
        bad, wanted = [t for t in found if t.in_features % 16], "16, 32 or 64"
    else:
        bad, wanted = [t for t in found if t.in_features % block_size], str(block_size)
        if not bad:
            return block_size
    shown = ", ".join(f"{t.name} ({t.in_features})" for t in bad[:3]) + (", ..." if len(bad) > 3 else "")
    raise TargetError(
        f"block_size={block_size} does not divide the in_features of {len(bad)} of {len(found)} targets: {shown}",
        expected=f"in_features divisible by {wanted}",
        fix=f'use block_size="auto" or one of {", ".join(map(str, fitting)) or "no size"}, which divide all targets',
    )


def normalise_name(name: str) -> str:
    """A layer's name as files spell it: without PEFT's `.base_layer` and torch.compile's `_orig_mod.`."""
    return name.replace("._orig_mod", "").removeprefix("_orig_mod.").replace(".base_layer", "")


def canonical_name(name: str) -> str:
    """A layer's name without the level that transformers 5 dropped from CLIPTextModel; older files keep it."""
    return name.removeprefix("text_model.")


def architecture_of(model: nn.Module) -> Architecture | None:
    """The row of a model's class, or of the nearest class that it derives from (FSDP2 makes subclasses)."""
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)


def _resolve(model: nn.Module, row: Architecture | None, targets: str | tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(targets, str):
        return targets
    if targets not in TARGET_SETS:
        return (targets,)
    if row is not None:
        return (row.pattern(targets),)
    names = _guess(model, targets)
    if not names:
        raise TargetError(
            f"{type(model).__name__} has no row in the table of target sets, and none of its layers looks like "
            f"targets={targets!r}",
            expected="a model of the table, or attention projections inside repeated blocks",
            fix=f"pass a regular expression over its layer names; it has {_examples(model)}",
        )
    warnings.warn(
        f"{type(model).__name__} has no row in the table of target sets: {targets!r} is taken to be its "
        f"{len(names)} layers of that kind inside repeated blocks, such as {names[0]}",
        UserWarning,
        stacklevel=1,  # one place for all callers, so that preflight and injection warn once together
    )
    return ("|".join(map(re.escape, names)),)


def _guess(model: nn.Module, target_set: str) -> list[str]:
    """Layers by their names, for architectures without a row: inside repeated blocks, that is, ModuleLists."""
    lists = {normalise_name(n) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    found = []
    for raw_name, module in model.named_modules():
        name = normalise_name(raw_name)
        if _input_width(module) is None or _FOREIGN.search(raw_name) or _NEVER.search(name):
            continue
        if not _is_linear(module) and target_set in _LINEAR_SETS:
            continue
        parts = name.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts))]
        # `to_out` and `net` are ModuleLists too, of the steps of one layer.
        block = next((p for p in parents[:-1] if p in lists and p.rpartition(".")[2] not in ("to_out", "net")), None)
        if block is None:
            continue
        if target_set in ("all-linear", "all-linear+conv") or _is_of_set(name[block.rfind(".") + 1 :], target_set):
            found.append(name)
    return list(dict.fromkeys(found))  # a layer that PEFT wraps is met twice


def _is_of_set(inner: str, target_set: str) -> bool:
    """Whether a layer, named from its list of blocks on, belongs to "attention" or "attention+mlp"."""
    *parents, leaf = re.sub(r"\.0$", "", inner).split(".")
    if any(_MLP_PART.search(part) for part in parents):
        return target_set == "attention+mlp"
    return any(_ATTENTION_PART.search(part) for part in parents) and _ATTENTION_LAYER.fullmatch(leaf) is not None


def _unused(model: nn.Module, row: Architecture | None, hidden_state: int, *, drop_idle: bool) -> set[str]:
    """Layers that cannot learn: behind the last hidden state taken, or idle in the last block."""
    if row is None or (hidden_state == -1 and not row.idle):
        return set()
    places = {}
    for raw_name, module in model.named_modules():
        name = normalise_name(raw_name)
        if _is_linear(module) and (place := row.block_of(name)) is not None:
            places[name] = place
    counts: dict[str, int] = {}
    for blocks, index in places.values():
        counts[blocks] = max(counts.get(blocks, 0), index + 1)
    unused = set()
    for name, (blocks, index) in places.items():
        count = counts[blocks]
        used = hidden_state if hidden_state >= 0 else count + 1 + hidden_state
        inner = name.removeprefix(f"{blocks}.{index}.")
        if index >= used or (drop_idle and index == count - 1 and row.is_idle(inner)):
            unused.add(name)
    return unused


def _compile(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise TargetError(
                f"targets pattern {pattern!r} is no regular expression ({error})",
                expected=f"a target set ({', '.join(TARGET_SETS)}) or a valid regular expression",
                fix="correct the pattern",
            ) from error
    return compiled


def _refuse_fused(model: nn.Module) -> None:
    fused = [name for name, module in model.named_modules() if _uses_fused_projections(module)]
    if fused:
        raise TargetError(
            f"{type(model).__name__} has fused QKV projections ({fused[0]} and {len(fused) - 1} more), "
            "which bypass to_q, to_k and to_v",
            expected="separate projections",
            fix="call unfuse_qkv_projections() before injecting",
        )


def _uses_fused_projections(module: nn.Module) -> bool:
    if not getattr(module, "fused_projections", False):
        return False
    # diffusers' Attention keeps its flag after unfuse_qkv_projections(); there the processor decides.
    return type(module).__name__ != "Attention" or "Fused" in type(getattr(module, "processor", None)).__name__


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether q reads another input than k and v. diffusers' older attention says so, of others the name does."""
    told = getattr(module, "is_cross_attention", None)
    return told if isinstance(told, bool) else _CROSS_ATTENTION.search(name.rpartition(".")[2]) is not None


def _is_linear(module: nn.Module) -> bool:
    # By attribute, not by class: quantized linear layers (bitsandbytes, GGUF, ...) need not inherit from nn.Linear.
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def _input_width(module: nn.Module) -> int | None:
    """The size of the axis that a rotation acts on; None for what OFT does not adapt, grouped convolutions too."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels if module.groups == 1 else None
    return int(module.in_features) if _is_linear(module) else None  # type: ignore[arg-type]


def output_width(module: nn.Module) -> int:
    """How many features a layer puts out, or channels."""
    return int(module.out_channels if isinstance(module, nn.Conv2d) else module.out_features)  # type: ignore[arg-type]


def taps_of(module: nn.Module) -> int:
    """How many taps a convolution's kernel has; 1 for other layers."""
    return math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) else 1


def _is_weighted_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _spelled_out(model: nn.Module, patterns: Iterable[re.Pattern[str]]) -> str | None:
    """Advice where a pattern is the end of layers' names, as PEFT takes it."""
    names = [normalise_name(name) for name, module in model.named_modules() if _input_width(module) is not None]
    for pattern in patterns:
        whole = rf".*\.{pattern.pattern}"
        if any(re.fullmatch(whole, name) for name in names):
            return f"write {whole!r}: patterns match whole layer names, not their ends"
    return None


def _shown(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(repr(t) for t in targets)


def _examples(model: nn.Module) -> str:
    """Distinct linear layer names with indices blanked, a few of them, for error messages."""
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", normalise_name(n)) for n, m in model.named_modules() if _is_linear(m)}
    shown = sorted(names)[:6]
    return (", ".join(shown) + (", ..." if len(names) > 6 else "")) if shown else "no linear layer at all"
