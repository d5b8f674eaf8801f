"""kohya-ss/sd-scripts `networks.oft_v2` (091ece99, 2026-09): files and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.peers.algebra import (
    Metadata,
    Shapes,
    Tensors,
    Written,
    blend,
    draw_packed,
    generator,
    neumann,
    project,
    skew,
    times,
)


def kohya_metadata(
    tensors: Tensors, module: str, dim: int, alpha: float | None, arguments: Mapping[str, str], base: str
) -> dict[str, str]:
    """The header of sd-scripts: strings only, `ss_network_args` only if arguments were given, two hashes."""
    metadata = {
        "ss_output_name": "subject",
        "ss_network_module": module,
        "ss_network_dim": str(dim),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": base,
        "ss_v2": str(base.startswith("sd_v2")),
        "ss_sd_model_name": "model.safetensors",
        "ss_steps": "100",
    }
    if arguments:
        metadata["ss_network_args"] = json.dumps(dict(arguments))
    digest = hashlib.sha256(b"".join(name.encode() for name in sorted(tensors))).hexdigest()
    return metadata | {"sshs_model_hash": digest, "sshs_legacy_hash": digest[:8]}


def write_sd_scripts(
    layers: Shapes,
    *,
    block_size: int = 32,
    block_share: bool = False,
    coft: bool = False,
    coft_eps: float | None = None,
    oft_names: bool = False,
    base: str = "sd_v1",
    dtype: torch.dtype = torch.float32,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`<layer>.oft_R.weight` and nothing else; `ss_network_dim` is the block size.

    `ss_network_args` holds, as strings, what the user typed: the default of an argument is not in it. Both spellings
    `coft` and `oft_coft` (`block_share` and `oft_block_share`) are taken; `oft_names` chooses the second one.
    """
    draw, spelt = generator(seed), "oft_" if oft_names else ""
    tensors = {
        f"{layer}.oft_R.weight": draw_packed(draw, shape, block_size, block_share, norm).to(dtype)
        for layer, shape in layers.items()
    }
    arguments: dict[str, str] = {}
    if coft:
        arguments[f"{spelt}coft"] = "True"
    if coft_eps is not None:
        arguments["coft_eps"] = str(coft_eps)
    if block_share:
        arguments[f"{spelt}block_share"] = "True"
    if any(len(shape) == 4 and tuple(shape[2:]) != (1, 1) for shape in layers.values()):
        arguments["enable_conv"] = "True"
    return Written(tensors, kohya_metadata(tensors, "networks.oft_v2", block_size, None, arguments, base))


def merged_weight_sd_scripts(weight: Tensor, tensors: Tensors, metadata: Metadata, strength: float = 1.0) -> Tensor:
    """A linear layer: `W R^T`; a convolution of any kernel: `W R`. `R = N5(Q)`; linear in the strength.

    That is what was trained: with `coft` (or `oft_coft`) in `ss_network_args`, rows projected to `coft_eps`, 6e-5 if
    it was not given. Its own loader reads no argument from the file; that is this function with no metadata. It
    knows no `scaled_oft` either.
    """
    packed = tensors["oft_R.weight"].double()
    arguments = json.loads(metadata.get("ss_network_args", "{}"))
    told = arguments.get("oft_coft", arguments.get("coft", "False"))
    if told.lower() in ("1", "true", "yes", "y", "on"):
        packed = project(packed, float(arguments.get("coft_eps", 6e-5)))
    rotation = neumann(skew(packed))
    return blend(weight, times(weight, rotation.mT if weight.dim() == 2 else rotation), strength)
