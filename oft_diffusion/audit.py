"""What would make an adapter act on less than it says, or on something else: looked for in every eager forward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from oft_diffusion.compiling import is_compiled
from oft_diffusion.errors import AdapterError, TargetError
from oft_diffusion.hooks import LayerHook, hooked_layers
from oft_diffusion.plan import Stage, layer_of


class BypassAudit:
    """Notices adapted layers that a forward goes around.

    In the first forward every layer must fire. Later a block may be skipped as a whole (layer skipping, cached
    features); a layer that is gone from the model, or silent beside one of its own attention that fired, is bypassed.
    """

    def __init__(self) -> None:
        self._watching = False  # this forward began in eager code
        self._complete = False  # every layer has fired once
        self._compiled = False  # layers in compiled code do not report

    def restart(self) -> None:
        """Other layers are adapted now."""
        self._watching = self._complete = self._compiled = False

    def begin(self, hooks: Iterable[LayerHook]) -> None:
        """A forward begins, outside compiled code."""
        self._watching = True
        for hook in hooks:
            hook.fired = False

    def end(self, model: nn.Module, hooks: Mapping[str, LayerHook], stages: Sequence[Stage]) -> None:
        """That forward is over.

        Raises:
            TargetError: layers were bypassed, which would be a silent no-op.
        """
        if not self._watching or self._compiled:
            return
        self._watching = False
        wanted = {site for stage in stages for site in stage.sites}
        silent = sorted(name for name in wanted if not hooks[name].fired)
        if not silent:
            self._complete = True
            return
        self._compiled = is_compiled(model)
        if self._compiled:
            return
        if self._complete:
            silent = _bypassed(model, silent, [name for name in wanted if hooks[name].fired])
        if silent:
            raise TargetError(
                f"{len(silent)} of {len(wanted)} adapted layers of {type(model).__name__} were bypassed: "
                f"{', '.join(silent[:5])}{', ...' if len(silent) > 5 else ''}",
                expected="every target to be called as a module in a forward",
                fix="undo what bypasses them (fused projections, replaced modules), or narrow the targets",
            )


def refuse_fused_lora(model: nn.Module) -> None:
    """Refuse a PEFT adapter that is merged into a layer whose input an OFT adapter rotates, or whose weight it did.

    Live, a LoRA adds to the rotated weight, `W R^T + B A`; merged, it would be rotated too, `(W + B A) R^T`.

    Raises:
        AdapterError: there is one.
    """
    if not hasattr(model, "peft_config"):
        return
    hooked = {id(module) for module in hooked_layers(model).values()}
    for name, module in model.named_modules():
        if getattr(module, "merged", False) and id(getattr(module, "base_layer", None)) in hooked:
            raise AdapterError(
                f"a LoRA is fused into {name} of {type(model).__name__}, where an OFT adapter acts",
                expected="a live LoRA beside a live OFT adapter, or fusing in the order OFT, LoRA and back",
                fix="call unfuse_lora; to fuse both, fuse_oft first. To keep a fused LoRA as the base, "
                "unload_lora_weights",
            )


def _bypassed(model: nn.Module, silent: Sequence[str], fired: Iterable[str]) -> list[str]:
    here = hooked_layers(model)
    running = {_parent(name) for name in fired}
    return [name for name in silent if name not in here or _parent(name) in running]


def _parent(name: str) -> str:
    """The attention or MLP that a layer is part of: `blocks.0.attn1` for its `to_q` and its `to_out.0`."""
    return re.sub(r"(?<!\d)\.\d+$", "", layer_of(name)).rpartition(".")[0]
