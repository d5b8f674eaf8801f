"""Dtypes: which one autocast makes a layer compute in, a place without it, and what a device computes in by itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Asking of any other kind ("meta") raises; asked beforehand, since the compiler would make a graph of the question.
_KNOWN = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)


def compute_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that a linear layer computes in: autocast's where that is on, else its input's own.

    Args:
        device: of the layer's input.
        dtype: of the input, None where that is not floating.

    Returns:
        As autocast has it, which leaves float64 alone; None where nothing tells.
    """
    if dtype == torch.float64 or device.type not in _KNOWN or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


def as_computed(x: Tensor) -> Tensor:
    """A layer's input in the dtype in which the layer computes; autograd casts the gradient back."""
    dtype = compute_dtype(x.device, x.dtype)
    return x if x.dtype == dtype else x.to(dtype)


def computes_in_bfloat16(device: str) -> bool:
    """Whether a device, as torch spells it, has instructions for bfloat16; emulated, it is slower than float32."""
    kind = device.partition(":")[0]
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}  # since torch 2.11
    return any(able for name, able in known.items() if "bf16" in name)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Nothing is cast inside."""
    return torch.autocast(device.type, enabled=False) if device.type in _KNOWN else nullcontext()
