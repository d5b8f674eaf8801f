"""Quantized layers below an adapter: what a training step keeps of them, and how it gets past them.

Layers whose weights are streamed go the same way (`streaming.py`), quantized or not.

A frozen layer has one gradient, that of its input, `grad W`, for which the quantized weight is enough. Libraries leave
it to autograd: torchao and GGUF dequantize in the forward, and the graph keeps each float weight to the backward, as
much as the base would be in full; bitsandbytes' int8 and quanto keep each layer's input, for the gradient of a weight
that has none. Here a backward dequantizes one weight at a time, and nothing else is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oft_diffusion.quantized import FourBit, LayerWeight, quantized_weight


def freeze_quantized(model: nn.Module) -> None:
    """Have a component's quantized layers, adapted or not, keep nothing for their backward.

    bitsandbytes' NF4 keeps nothing as it is. Layers whose forward somebody has replaced already (offloading that goes
    layer by layer) are left alone.
    """
    for layer in model.modules():
        weight = quantized_weight(layer)
        if isinstance(weight, FourBit):
            weight.stay_unpacked()
        elif weight is not None and isinstance(layer, nn.Linear) and "forward" not in layer.__dict__:
            layer.forward = FrozenForward(weight)  # type: ignore[method-assign, assignment]


def thaw_quantized(model: nn.Module) -> None:
    """Give layers their own forward back."""
    for layer in model.modules():
        if type(layer.__dict__.get("forward")) is FrozenForward:  # streamed ones stay so
            del layer.forward


_OFFLOADING = ("_hf_hook", "_diffusers_hook")  # what accelerate and diffusers keep their hooks in


class FrozenForward:
    """In the place of a frozen layer's forward: the same answer, with `grad W` for its whole backward.

    The innermost of a layer's call, so that all hooks have seen the input. An object, so that a copied component's
    layers have their own.
    """

    def __init__(self, weight: LayerWeight) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not x.requires_grad or self.wants_the_librarys_graph():
            return self.as_it_is(x)
        out: Tensor = _Frozen.apply(x, self)
        return out

    def wants_the_librarys_graph(self) -> bool:
        """Whether a backward finds more than the input's gradient, or the weight elsewhere, or is traced."""
        layer = self.weight.layer
        trained = layer.bias is not None and layer.bias.requires_grad
        return trained or any(name in layer.__dict__ for name in _OFFLOADING) or torch.compiler.is_compiling()

    def as_it_is(self, x: Tensor) -> Tensor:
        """What the library makes of `x`, `(..., in)` to `(..., out)`."""
        answer: Tensor = type(self.weight.layer).forward(self.weight.layer, x)
        return answer

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight as floats, `(out, in)`."""
        return self.weight.values(dtype)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: FrozenForward) -> Tensor:
        ctx.frozen, ctx.dtype = frozen, x.dtype
        return frozen.as_it_is(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return (grad @ ctx.frozen.values(grad.dtype)).to(ctx.dtype), None
