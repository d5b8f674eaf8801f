"""Under `torch.compile`, on cards: the Triton kernels in the compiler's graph, in place of the ops that launch them.

An op is a call of Python in every step, which costs more than many a rotation; a kernel that the compiler knows is
launched by the code that it writes. As `torch.library.triton_op` does it, but for ops that have other forms, too, and
with the kernels' text in the op's `form` for the compiler's caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from oft_diffusion.kernels.block_rotate import OPS, delta_grad_on_gpu, rotate_on_gpu, triton_kernels
from oft_diffusion.kernels.rotate_shared import kernels_for, rotate_each, separate_grads


def has_kernel(x: Tensor, size: int) -> bool:
    """Whether a single rotation is a kernel's."""
    kernels = triton_kernels() if x.is_cuda else None
    return kernels is not None and kernels.fits(x, size)


# By op: what it does on a card, and whether that is a kernel.
_FORMS: dict[str, tuple[Callable[..., Any], Callable[..., bool]]] = {
    "block_rotate": (rotate_on_gpu, lambda x, delta: has_kernel(x, delta.shape[-1])),
    "block_rotate_delta_grad": (delta_grad_on_gpu, lambda x, grad, shape: has_kernel(x, shape[-1])),
    "block_rotate_shared": (rotate_each, lambda x, deltas: kernels_for(x, deltas) is not None),
    "block_rotate_shared_grads": (separate_grads, lambda x, deltas, *_: kernels_for(x, deltas) is not None),
}


def _inline(name: str, form: Callable[..., Any], fits: Callable[..., bool]) -> None:
    def traced(mode: Any, op: Any, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not fits(*args):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return form(*args)

    torch.library.register_torch_dispatch(f"oft_diffusion::{name}", FunctionalTensorMode, traced, lib=OPS)


for _name, (_form, _fits) in _FORMS.items():
    _inline(_name, _form, _fits)
