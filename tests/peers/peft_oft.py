"""PEFT 0.21.2 (and what changed in 0.18): directories of OFT adapters, and the weight that a layer's formula gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.peers.algebra import (
    Shapes,
    Tensors,
    Written,
    cayley,
    draw_packed,
    generator,
    neumann,
    old_neumann,
    project,
    save,
    skew,
    times,
)

PREFIX = "base_model.model."


def peft_config(
    modules: list[str],
    *,
    block_size: int = 32,
    block_share: bool = False,
    coft: bool = False,
    eps: float = 6e-5,
    exact: bool = False,
    terms: int = 5,
    peft_version: str | None = "0.21.2",
    **others: Any,
) -> dict[str, Any]:
    """`adapter_config.json`; `peft_version=None` leaves the entry out, as PEFT before 0.18 did."""
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "block_share": block_share,
        "coft": coft,
        "eps": eps,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "module_dropout": 0.0,
        "modules_to_save": None,
        "num_cayley_neumann_terms": terms,
        "oft_block_size": block_size,
        "peft_type": "OFT",
        "peft_version": peft_version,
        "r": 0,
        "revision": None,
        "target_modules": sorted(modules),
        "task_type": None,
        "use_cayley_neumann": not exact,
    }
    if peft_version is None:
        del config["peft_version"]
    return config | others


def peft_file(
    layers: Shapes,
    *,
    block_size: int = 32,
    block_share: bool = False,
    dtype: torch.dtype = torch.float32,
    prefix: str = PREFIX,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`adapter_model.safetensors`: `<prefix><module>.oft_R.weight (r or 1, b (b - 1) / 2)`; the layers are modules.

    With `prefix=""` it is what diffusers' mixin saves. The rows are not projected, as after an optimiser's step.
    """
    draw = generator(seed)
    tensors = {
        f"{prefix}{module}.oft_R.weight": draw_packed(draw, shape, block_size, block_share, norm).to(dtype)
        for module, shape in layers.items()
    }
    return Written(tensors, {"format": "pt"})


def write_peft(
    directory: Path,
    layers: Shapes,
    *,
    block_size: int = 32,
    block_share: bool = False,
    coft: bool = False,
    eps: float = 6e-5,
    exact: bool = False,
    terms: int = 5,
    peft_version: str | None = "0.21.2",
    dtype: torch.dtype = torch.float32,
    norm: float = 0.5,
    seed: int = 0,
) -> Path:
    """The directory that `save_pretrained` makes. A convolution larger than 1x1 is written too, and must be refused."""
    written = peft_file(layers, block_size=block_size, block_share=block_share, dtype=dtype, norm=norm, seed=seed)
    config = peft_config(
        list(layers),
        block_size=block_size,
        block_share=block_share,
        coft=coft,
        eps=eps,
        exact=exact,
        terms=terms,
        peft_version=peft_version,
    )
    return _directory(directory, written, config)


def merged_weight_peft(weight: Tensor, tensors: Tensors, config: Mapping[str, Any], strength: float = 1.0) -> Tensor:
    """`W R^T` of a linear layer or a 1x1 convolution, from `oft_R.weight` and `adapter_config.json`.

    With `use_cayley_neumann`, `R = N_n(Q)`, before 0.18 (or without `peft_version`) the series whose last weight is 2;
    else `R = (I - Q)(I + Q)^-1 = C(-Q)`. With `coft` the rows are projected to `eps` first. PEFT has no strength, and
    its forward of a larger kernel is not that of any weight.
    """
    if strength != 1.0:
        raise ValueError("PEFT's OFT has no strength")
    if any(side != 1 for side in weight.shape[2:]):
        raise ValueError("PEFT's forward of a larger kernel is broken")
    packed = tensors["oft_R.weight"].double()
    if config["coft"]:
        packed = project(packed, config["eps"])
    return times(weight, peft_rotation(packed, config).mT)


def peft_rotation(packed: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The blocks of `R` for rows that are projected already."""
    q = skew(packed)
    if not config["use_cayley_neumann"]:
        return cayley(-q)
    series = neumann if _at_least_018(config.get("peft_version")) else old_neumann
    return series(q, config["num_cayley_neumann_terms"])


def _at_least_018(peft_version: str | None) -> bool:
    """Of `0.21.2` or `0.18.0.dev0@<commit>`; the entry is newer than 0.17."""
    if peft_version is None:
        return False
    major, minor = peft_version.partition("@")[0].split(".")[:2]
    return (int(major), int(minor)) >= (0, 18)


# What must be refused


def write_old_peft(
    directory: Path,
    layers: Shapes,
    *,
    version: Literal["0.13", "0.15"] = "0.15",
    blocks: int = 4,
    live: bool = False,
    seed: int = 0,
) -> Path:
    """Full matrices. 0.14 and 0.15: `<module>.oft_r (r, in/r, in/r)` and row scales `<module>.oft_s (out, 1)`.

    Until 0.13 `oft_r (r, out/r, out/r)` alone, and no `oft_block_size`. `save_pretrained` cuts the adapter's name off,
    so that the key ENDS with `.oft_r`: PEFT 0.21 does not see it, warns and loads nothing. `live` keeps the name:
    `.oft_r.default`.
    """
    draw, end = generator(seed), ".default" if live else ""
    tensors = {}
    for module, shape in layers.items():
        size = shape[0 if version == "0.13" else 1] // blocks
        tensors[f"{PREFIX}{module}.oft_r{end}"] = 0.1 * torch.randn(blocks, size, size, generator=draw)
        if version == "0.15":
            tensors[f"{PREFIX}{module}.oft_s{end}"] = 1 + 0.1 * torch.randn(shape[0], 1, generator=draw)
    config = peft_config(list(layers), block_size=0, peft_version=None, r=blocks)
    for newer in ("use_cayley_neumann", "num_cayley_neumann_terms", *(["oft_block_size"] if version == "0.13" else [])):
        del config[newer]
    return _directory(directory, Written(tensors, {"format": "pt"}), config)


def write_peft_boft(directory: Path, layers: Shapes, *, block_size: int = 4, factors: int = 1, seed: int = 0) -> Path:
    """PEFT's BOFT: `<module>.boft_R (factors, in/b, b, b)` and `<module>.boft_s (out, 1)`."""
    draw = generator(seed)
    tensors = {}
    for module, shape in layers.items():
        blocks = shape[1] // block_size
        tensors[f"{PREFIX}{module}.boft_R"] = 0.1 * torch.randn(factors, blocks, block_size, block_size, generator=draw)
        tensors[f"{PREFIX}{module}.boft_s"] = 1 + 0.1 * torch.randn(shape[0], 1, generator=draw)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "boft_block_num": 0,
        "boft_block_size": block_size,
        "boft_dropout": 0.0,
        "boft_n_butterfly_factor": factors,
        "peft_type": "BOFT",
        "peft_version": "0.21.2",
        "target_modules": sorted(layers),
    }
    return _directory(directory, Written(tensors, {"format": "pt"}), config)


def write_peft_embedding(directory: Path, layers: Shapes, *, block_size: int = 4, seed: int = 0) -> Path:
    """An embedding `(num, dim)`: `<module>.oft_embedding_R.weight`, whose formula is `E R`, not `E R^T`."""
    written = peft_file(layers, block_size=block_size, seed=seed)
    tensors = {key.replace(".oft_R.", ".oft_embedding_R."): tensor for key, tensor in written.tensors.items()}
    return _directory(directory, Written(tensors, written.metadata), peft_config(list(layers), block_size=block_size))


def _directory(directory: Path, written: Written, config: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save(written, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return directory
