"""What comes and goes, counted without numbers: STEP, ENCODE and DRAW of tests/training/test_memory_presets.py.

python -m benchmarks.step_memory    # GB for each base, within a step, checkpointed and not, and of its VAE; two minutes

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

from benchmarks.full_size import FULL_SIZE, full_size, sd3_large
from benchmarks.works import WORKS, Sizes
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.training.memory import LiveStorages

LARGE = "SD 3.5 Large"
FAMILIES = {"SD 1.5": 2, "SDXL": 2, "SD 3.5 Medium": 1, LARGE: 1, "Flux.1": 1}  # pictures at once


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
        work = WORKS["SD 3.5 Medium" if name == LARGE else name](Sizes(pictures))  # whose inputs Large takes, too
        if name == LARGE:
            work.denoiser = sd3_large()
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


def vae_gigabytes(name: str) -> tuple[float, float]:
    """GB at most while a picture of the base's resolution is encoded, and while one is decoded, in float32."""
    vae, side = full_size(name, "meta", torch.float32)["vae"].requires_grad_(False).eval(), FULL_SIZE[name].resolution
    pixels = torch.empty(1, 3, side, side, device="meta")
    latents = torch.empty(1, vae.config.latent_channels, side // 8, side // 8, device="meta")
    found = []
    for call, given in ((vae.encode, pixels), (vae.decode, latents)):
        with torch.no_grad(), fused_attention(), LiveStorages("meta") as alive:
            call(given)
        found.append(alive.most / 1e9)
    return found[0], found[1]


def main() -> None:
    for name, pictures in FAMILIES.items():
        found = [step_gigabytes(name, pictures, checkpointed=checkpointed) for checkpointed in (True, False)]
        vae = "encoding {:.2f} GB, decoding {:.2f} GB".format(*vae_gigabytes(name))
        print(f"{name}: checkpointed {found[0]:.2f} GB, else {found[1]:.2f} GB; {vae}", flush=True)


if __name__ == "__main__":
    main()
