"""What the library's tests share: tiny states, generators far from the identity, and files written byte by byte."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from oft_diffusion.bank import OFTBank
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import OFTError
from oft_diffusion.files import HEADER_KEY, AdapterMetadata, save_adapter_file
from oft_diffusion.rotation import block_size_of, packed_size, unpack

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.{}.oft_R.weight"


def generators(blocks: int, block_size: int, *, seed: int = 0, norm: float = 0.5) -> Tensor:
    """Random packed generators `(blocks, b(b-1)/2)` whose largest spectral norm is `norm`."""
    packed = torch.randn(blocks, packed_size(block_size), generator=torch.Generator().manual_seed(seed))
    return packed * (norm / torch.linalg.matrix_norm(unpack(packed), 2).max())


def excite(bank: OFTBank, name: str = "default", *, seed: int = 0, norm: float = 0.5) -> None:
    """Give an adapter random generators of that spectral norm, so that it moves what it adapts."""
    parameter = bank.generators[name]
    block_size = block_size_of(parameter.shape[1])
    assert block_size is not None
    with torch.no_grad():
        parameter.copy_(generators(parameter.shape[0], block_size, seed=seed, norm=norm))
    bank.refresh()


def tiny_unet(seed: int = 0, width: int = 16) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def unet_state(block_size: int = 8, blocks: int = 2) -> dict[str, Tensor]:
    return {LAYER.format(f"to_{x}"): generators(blocks, block_size, seed=i) for i, x in enumerate("qkv")}


def adapter_file(folder: Path, **metadata: object) -> Path:
    """A sound file of three layers."""
    described = AdapterMetadata(components={"unet": OFTConfig(block_size=8)}, trigger="sks")
    return save_adapter_file(
        folder / "mug.safetensors",
        {"unet": unet_state()},
        AdapterMetadata(**{**described.__dict__, **metadata}),
    )


def split_raw(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header and body."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: Mapping | bytes, body: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header; `length` overrides what it says of the header's size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def with_metadata(path: Path, change: Mapping[str, object] | str) -> Path:
    """Rewrite entries of a file's JSON metadata, or all of it, and leave the tensors alone."""
    header, body = split_raw(path.read_bytes())
    if isinstance(change, str):
        header["__metadata__"][HEADER_KEY] = change
    else:
        ours = {**json.loads(header["__metadata__"][HEADER_KEY]), **change}
        header["__metadata__"][HEADER_KEY] = json.dumps(ours)
    return write_raw(path, header, body)


def assert_one_sentence(error: pytest.ExceptionInfo[OFTError], *names: str) -> None:
    """The message names the thing, and says in one line what was expected and what to do."""
    message = str(error.value)
    assert type(error.value).__mro__[1] is OFTError or type(error.value) is OFTError
    assert re.fullmatch(r".+ Expected: .+ Fix: .+", message), message
    assert len(message) < 1000
    for name in names:
        assert name in message
