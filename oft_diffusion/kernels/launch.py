"""Launching a Triton kernel, and launching it again: what Triton works out anew in every call is kept.

A launch through Triton costs the processor tens of microseconds, more than a small rotation takes on the card. For
tensors that lie as others did before, in the same dtype and on the same device, all of it is known but the addresses.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

INTERPRETED: bool = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False
_MOST = 4096  # launches; beyond, all are forgotten
_known: dict[Hashable, Callable[..., object]] = {}


def key_of(name: str, *tensors: Tensor) -> Hashable:
    """What tells a launch from others; None where it is not to be kept.

    Args:
        name: of the kernel, with whatever else its launch depends upon.
        tensors: all that it reads; those it writes are new, and lie as these say.
    """
    first = tensors[0]
    # Triton compiles for addresses that are multiples of 16, and for others.
    if INTERPRETED or is_traced(first) or any(tensor.data_ptr() % 16 for tensor in tensors):
        return None
    lie = [(tensor.shape, tensor.stride()) for tensor in tensors]
    return (name, first.dtype, first.get_device(), precision(first), *lie)


def again(key: Hashable, tensors: Sequence[Tensor]) -> bool:
    """Launch what was launched before, on these tensors; False where it is not known."""
    known = _known.get(key) if key is not None else None
    if known is None:
        return False
    with device_of(tensors[0]):
        known(*tensors)
    return True


def launch(
    kernel: Any, programs: int, tensors: Sequence[Tensor], numbers: Sequence[int], key: Hashable, **options: Any
) -> None:
    """Launch a kernel through Triton, which compiles it where needed; where the compiler traces, put it into its graph.

    Args:
        kernel: a `triton.jit` function of tensors, then numbers, then constants.
        programs: how many run.
        tensors: its first arguments.
        numbers: its next.
        key: by `key_of`, under which to keep the launch.
        options: its constants by name, `num_warps` and `num_stages`.
    """
    if is_traced(tensors[0]):
        torch.library.wrap_triton(kernel)[(programs,)](*tensors, *numbers, **options)
        return
    with device_of(tensors[0]):
        compiled = kernel[(programs,)](*tensors, *numbers, **options)
        if key is None or compiled is None:
            return
        run = compiled[(programs, 1, 1)]
    if len(_known) >= _MOST:
        _known.clear()
    rest = (*numbers, *(options[name] for name in kernel.arg_names if name in options))
    _known[key] = lambda *own: run(*own, *rest)


def is_traced(x: Tensor) -> bool:
    """Whether it is AOTAutograd that asks, with tensors that have no memory (`inlined.py`)."""
    return isinstance(x, FunctionalTensor)


def precision(x: Tensor) -> str:
    """What torch's own float32 products do: the tensor cores' shorter mantissa only where the user allowed it."""
    if x.dtype != torch.float32:
        return "ieee"  # read for float32 alone
    matmul = torch.backends.cuda.matmul
    # The older name raises, in newer releases of torch, once the newer one was set.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def upcast(x: Tensor) -> bool:
    """The interpreter keeps bfloat16 as integers, and multiplies those (triton-lang/triton#11584)."""
    return INTERPRETED and x.dtype == torch.bfloat16


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Of a card: what it can compute."""
    return torch.cuda.get_device_capability(index)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's; entering a device costs microseconds."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
