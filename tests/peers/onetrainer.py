"""OneTrainer 23df3832 (2026-08): files of OFT_2, and the weights that its layers compute."""

from __future__ import annotations

import json
import math
from typing import Literal

import torch
from torch import Tensor

from tests.peers.algebra import (
    Metadata,
    Shapes,
    Tensors,
    Written,
    blend,
    block_size_of,
    draw_packed,
    generator,
    neumann,
    old_neumann,
    project,
    skew,
    times,
)


def divisor(block_size: int, legacy: bool = False) -> float:
    """Of `v` in Scaled OFT: `2 sqrt(b - 1)`; in the builds before the merge `sqrt(b (b - 1) / 2)`, same marker."""
    return math.sqrt(block_size * (block_size - 1) / 2) if legacy else 2 * math.sqrt(block_size - 1)


def write_onetrainer(
    layers: Shapes,
    *,
    block_size: int = 32,
    block_share: bool = False,
    scaled: bool = False,
    legacy_scale: bool = False,
    coft_eps: float | None = None,
    config: bool = False,
    base: Literal["sd1", "sd2", "sdxl", "flux"] = "sd1",
    embedding: str | None = None,
    dtype: torch.dtype = torch.float32,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`<layer>.oft_R.weight`, and `<layer>.oft_R.scaled_oft` if scaled: no alpha, no block size.

    Every tensor is cast to `dtype`, the marker (created as a bool) too. `norm` is that of the unscaled Q. `coft_eps`
    (builds until 2026-05) is told only in `ot_config`, which is there if the user wished it, or COFT is on.
    """
    draw = generator(seed)
    tensors = {}
    for layer, shape in layers.items():
        packed = draw_packed(draw, shape, block_size, block_share, norm)
        if scaled:
            packed = packed * divisor(block_size_of(packed), legacy_scale)
            tensors[f"{layer}.oft_R.scaled_oft"] = torch.tensor(True).to(dtype)
        tensors[f"{layer}.oft_R.weight"] = packed.to(dtype)
    if embedding is not None:
        tensors[f"bundle_emb.{embedding}.clip_l"] = torch.randn(2, 32, generator=draw).to(dtype)
    metadata = _MODELSPEC | {"ot_branch": "master", "ot_revision": "23df383"} | _BASE[base]
    if config or coft_eps is not None:
        settings = {"peft_type": "OFT_2", "oft_block_size": block_size, "oft_block_share": block_share}
        settings |= {"oft_scaled": scaled} if coft_eps is None else {"oft_coft": True, "coft_eps": coft_eps}
        metadata["ot_config"] = json.dumps(settings)
    return Written(tensors, metadata)


_MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.title": "a subject",
    "modelspec.date": "2026-08-19",
    "modelspec.hash_sha256": "0x" + "ab" * 32,
}
_BASE: dict[str, dict[str, str]] = {
    "sd1": {},
    "sd2": {"ss_v2": "True"},
    "sdxl": {"ss_base_model_version": "sdxl_"},
    "flux": {},
}


def merged_weight_onetrainer(
    weight: Tensor,
    tensors: Tensors,
    metadata: Metadata,
    strength: float = 1.0,
    *,
    legacy_scale: bool = False,
    old_series: bool = False,
) -> Tensor:
    """A linear layer: `W R^T`; a convolution of ANY kernel, 1x1 too: `W R`. `R = N5(Q)`.

    `Q` of `v`, or of `v / (2 sqrt(b - 1))` where the marker is present, whatever its value. COFT (in `ot_config`)
    projected the stored `v`, before scaling, and in linear layers only. `old_series` is the build of 2025-11-14..16,
    `N5 + Q^4`. OneTrainer trains at strength 1; `strength` blends linearly, as what serves its files does.
    """
    packed = tensors["oft_R.weight"].double()
    linear = weight.dim() == 2
    settings = json.loads(metadata.get("ot_config", "{}"))
    if settings.get("oft_coft", False) and linear:
        packed = project(packed, settings["coft_eps"])
    if "oft_R.scaled_oft" in tensors:
        packed = packed / divisor(block_size_of(packed), legacy_scale)
    rotation = (old_neumann if old_series else neumann)(skew(packed))
    return blend(weight, times(weight, rotation.mT if linear else rotation), strength)
