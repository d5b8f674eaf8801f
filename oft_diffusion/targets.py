"""Which layers to adapt, per architecture, as a table. A new architecture is a new row.

Patterns are regular expressions matched against whole layer names, anchored to the block lists, so that nothing
outside them (final projections, timestep and caption embedders, ...) is ever adapted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from oft_diffusion.errors import TargetError

TARGET_SETS = ("attention", "attention+mlp", "all-linear")

_UNET_BLOCK = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"
_CLIP_LAYER = r"(text_model\.)?encoder\.layers\.\d+"


@dataclass(frozen=True)
class Architecture:
    """One row: patterns by what they add. `attention+mlp` is attention and mlp, `all-linear` all three."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    def patterns(self, target_set: str) -> tuple[str, ...]:
        count = TARGET_SETS.index(target_set) + 1
        return tuple(p for group in (self.attention, self.mlp, self.other)[:count] for p in group)


_CLIP = Architecture(
    attention=(rf"{_CLIP_LAYER}\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",),
    mlp=(rf"{_CLIP_LAYER}\.mlp\.(fc1|fc2)",),
)

ARCHITECTURES: dict[str, Architecture] = {
    "UNet2DConditionModel": Architecture(
        attention=(rf"{_UNET_BLOCK}\.transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",),
        mlp=(rf"{_UNET_BLOCK}\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",),
        other=(rf"{_UNET_BLOCK}\.(proj_in|proj_out)",),  # linear in SD 2.x; SD 1.x's are 1x1 convolutions, left alone
    ),
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
}

# Names of layers that other adapters put inside a target; never targets themselves.
_FOREIGN = re.compile(r"(^|\.)(lora_[A-Za-z_]+|oft_[A-Za-z_]+)(\.|$)")


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its name as files spell it, its module, and the size of its input axis."""

    name: str
    module: nn.Module
    in_features: int


def find_targets(model: nn.Module, targets: str | tuple[str, ...]) -> list[Target]:
    """The layers of `model` that `targets` names, in the model's own order.

    Args:
        model: a diffusers or transformers component, or any module for which patterns are passed.
        targets: a set's name (`TARGET_SETS`), one regular expression, or several.

    Raises:
        TargetError: the architecture has no row and a set's name was passed; nothing matched; projections are fused;
            a pattern is no regular expression; a matched layer is no linear layer.
    """
    patterns = _compile(_resolve(model, targets))
    _refuse_fused(model)
    found: list[Target] = []
    for raw_name, module in model.named_modules():
        name = normalise_name(raw_name)
        if _FOREIGN.search(raw_name) or not any(p.fullmatch(name) for p in patterns):
            continue
        if hasattr(module, "base_layer"):  # another adapter's wrapper: the layer inside is visited under the same name
            continue
        if _is_linear(module):
            found.append(Target(name, module, int(module.in_features)))
        elif _is_weighted_leaf(module) and targets not in TARGET_SETS:
            # Table patterns may meet 1x1 convolutions (SD 1.x's proj_in); what a user asked for by name is refused.
            raise TargetError(
                f"layer {name} of {type(model).__name__} is a {type(module).__name__}, which OFT does not adapt",
                expected="linear layers (modules with in_features)",
                fix="narrow the pattern so that it matches linear layers only",
            )
    if not found:
        raise TargetError(
            f"targets={_shown(targets)} match no layer of {type(model).__name__}",
            expected=f"at least one linear layer; this model has {_examples(model)}",
            fix="pass a regular expression that matches whole layer names",
        )
    return found


def find_layers(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """The linear layers of `model` of these very names, in the model's own order, with or without `text_model.`.

    Raises:
        TargetError: there is no such linear layer; projections are fused.
    """
    wanted = {canonical_name(name): name for name in names}
    _refuse_fused(model)
    found: list[Target] = []
    for raw_name, module in model.named_modules():
        name = normalise_name(raw_name)
        is_layer = _is_linear(module) and not hasattr(module, "base_layer") and not _FOREIGN.search(raw_name)
        if is_layer and wanted.pop(canonical_name(name), None) is not None:
            found.append(Target(name, module, int(module.in_features)))
    if wanted or not found:
        shown = "; ".join(sorted(wanted.values())[:3]) + ("; ..." if len(wanted) > 3 else "")
        raise TargetError(
            f"{len(wanted)} of {len(wanted) + len(found)} layers match no linear layer of {type(model).__name__}: "
            f"{shown or '(none is named)'}",
            expected=f"names of its linear layers; it has {_examples(model)}",
            fix="use the architecture that these layers belong to",
        )
    return found


def choose_block_size(found: Iterable[Target], block_size: int | Literal["auto"]) -> int:
    """The block size to use; "auto" is the largest of 64, 32 and 16 that divides every target.

    Raises:
        TargetError: some target's in_features is not divisible. Sizes are never adjusted in silence.
    """
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


def _resolve(model: nn.Module, targets: str | tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(targets, str):
        return targets
    if targets not in TARGET_SETS:
        return (targets,)
    row = ARCHITECTURES.get(type(model).__name__)
    if row is None:
        raise TargetError(
            f"{type(model).__name__} has no row in the table of target sets",
            expected=f"one of {', '.join(ARCHITECTURES)} for targets={targets!r}",
            fix=f"pass a regular expression over its layer names; it has {_examples(model)}",
        )
    return row.patterns(targets)


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


def _is_linear(module: nn.Module) -> bool:
    # By attribute, not by class: quantized linear layers (bitsandbytes, GGUF, ...) need not inherit from nn.Linear.
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def _is_weighted_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _shown(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(repr(t) for t in targets)


def _examples(model: nn.Module) -> str:
    """Distinct linear layer names with indices blanked, a few of them, for error messages."""
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", normalise_name(n)) for n, m in model.named_modules() if _is_linear(m)}
    shown = sorted(names)[:6]
    return (", ".join(shown) + (", ..." if len(names) > 6 else "")) if shown else "no linear layer at all"
