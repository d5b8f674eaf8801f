"""A card's way through the package, on a processor: tensors take the Triton kernels, and D is solved for as there."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from oft_diffusion import rotation
from oft_diffusion.kernels import processor

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def pretend(patch: pytest.MonkeyPatch, *, runs: bool) -> list[str]:
    """Take whatever forms the package has for a card.

    Nothing here asks what kernels would be: a card's own conditions (Ampere, a device's memory) are all that is left
    out. `tests.helpers.trace_kernels` does it for a compiler.

    Args:
        patch: undoes it.
        runs: whether kernels do run, which takes Triton's interpreter; else they are noted, and write nothing.

    Returns:
        The names of the kernels that were launched, as they come.
    """
    from oft_diffusion.kernels import launch, triton_rotate, triton_shared

    if runs and not launch.INTERPRETED:
        pytest.skip("Triton compiles here (TRITON_INTERPRET is not 1), for a card's tensors alone")
    # By their paths: the package has functions of the same names.
    one, several = (importlib.import_module(f"oft_diffusion.kernels.{n}") for n in ("block_rotate", "rotate_shared"))
    launched: list[str] = []

    def noticed(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__.strip("_"))
        if runs:
            launch.launch(kernel, *arguments, **options)

    def kernels_for(x: Tensor, deltas: Sequence[Tensor]) -> ModuleType | None:
        fits = triton_rotate.fits(x, deltas[0].shape[-1]) and len(deltas) in triton_shared.COUNTS
        return triton_shared if fits else None

    for module in (triton_rotate, triton_shared):
        patch.setattr(module, "launch", noticed)
        patch.setattr(module, "again", lambda key, tensors: False)
    for module in (one, several):
        patch.setattr(module, "is_small", lambda x: False)
    patch.setattr(one, "triton_kernels", lambda: triton_rotate)
    patch.setattr(one, "_rotated", one.rotate_on_gpu)
    patch.setattr(one, "_delta_grad", one.delta_grad_on_gpu)
    patch.setattr(several, "kernels_for", kernels_for)
    patch.setattr(processor, "library", lambda: None)
    patch.setattr(rotation, "_by_doubling", lambda q: None)
    return launched
