"""What comes and goes within a training step, counted without numbers: tests/training/test_memory_presets.py's STEP.

python -m benchmarks.step_memory    # GB for SD 1.5, SDXL, SD 3.5 Medium and Flux.1, checkpointed and not; a minute

The denoiser of full size is gone through on the device "meta", forward and backward, in bfloat16, with the default
adapter, an instance image and, of Stable Diffusion 1 and SDXL, a class image. Storages that operations make are
counted while they are alive. Attention is counted as a card's fused kernels have it, which keep what goes in and what
comes out, and no matrix of scores. What autocast keeps in float32 on a card, its workspaces and its allocator's gaps
are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.works import WORKS, Sizes
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.training.memory import LiveStorages

FAMILIES = {"SD 1.5": 2, "SDXL": 2, "SD 3.5 Medium": 1, "Flux.1": 1}  # pictures at once


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(kept) for kept in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return _Fused.apply(query, key, value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that makes its output alone, whatever is asked of it beside query, key and value."""
    own = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own


def step_gigabytes(name: str, pictures: int, *, checkpointed: bool) -> float:
    """GB at most beyond base, adapter and inputs; the generators' gradients are in it."""
    with torch.device("meta"):
        work = WORKS[name](Sizes(pictures))
    denoiser = work.denoiser.to(torch.bfloat16).requires_grad_(False)
    inject_oft(denoiser, OFTConfig()).to("meta")
    denoiser.train()
    if checkpointed:
        denoiser.enable_gradient_checkpointing()
    half = tree_map(
        lambda value: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value,
        work.inputs,
    )
    with fused_attention(), LiveStorages("meta") as alive:
        answer = denoiser(**half)[0]
        answer.float().square().mean().backward()
    return alive.most / 1e9


def main() -> None:
    for name, pictures in FAMILIES.items():
        found = [step_gigabytes(name, pictures, checkpointed=checkpointed) for checkpointed in (True, False)]
        print(f"{name}: checkpointed {found[0]:.2f} GB, else {found[1]:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
