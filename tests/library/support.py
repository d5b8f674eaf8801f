"""What the library's tests share: tiny states, generators far from the identity, and files written byte by byte."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import sealed
from oft_diffusion.errors import AdapterFileError, OFTError
from oft_diffusion.files import save_adapter_file
from oft_diffusion.inject import inject_oft
from oft_diffusion.metadata import HEADER_KEY, AdapterMetadata
from oft_diffusion.pipeline import list_oft_adapters, load_oft_weights, save_oft_weights
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


def seal_again(path: Path) -> Path:
    """A changed file as one that was written so."""
    path.write_bytes(sealed(path.read_bytes()))
    return path


def with_metadata(path: Path, change: Mapping[str, object] | str) -> Path:
    """Rewrite entries of a file's JSON metadata, or all of it, and leave the tensors alone; it is as if written so."""
    header, body = split_raw(path.read_bytes())
    if isinstance(change, str):
        header["__metadata__"][HEADER_KEY] = change
    else:
        ours = {**json.loads(header["__metadata__"][HEADER_KEY]), **change}
        header["__metadata__"][HEADER_KEY] = json.dumps(ours)
    return seal_again(write_raw(path, header, body))


def assert_one_sentence(error: pytest.ExceptionInfo[OFTError], *names: str) -> None:
    """The message names the thing, and says in one line what was expected and what to do."""
    message = str(error.value)
    assert type(error.value).__mro__[1] is OFTError or type(error.value) is OFTError
    assert re.fullmatch(r".+ Expected: .+ Fix: .+", message), message
    assert len(message) < 1000
    for name in names:
        assert name in message


# Pipelines

PROMPT = "a photo of sks mug"
BOTH = ("unet", "text_encoder")


def copy_pipe(pipe: Any) -> Any:
    """A pipeline of its own: nothing done to it reaches the original."""
    copied = type(pipe)(**copy.deepcopy(pipe.components), requires_safety_checker=False)
    copied.register_to_config(_name_or_path=pipe.config._name_or_path)
    copied.set_progress_bar_config(disable=True)
    return copied


def draw(pipe: Any, *, prompt: str = PROMPT, seed: int = 0) -> Tensor:
    """A picture in floats `(1, 3, 16, 16)`, always from the same noise."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt").images


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


class Maker:
    """Writes adapters for a base."""

    def __init__(self, base: Any, folder: Path) -> None:
        self.base = base
        self.folder = folder

    def __call__(
        self, name: str, seed: int = 1, parts: Sequence[str] = BOTH, config: OFTConfig | None = None, **metadata: Any
    ) -> Path:
        pipe = copy_pipe(self.base)
        for part in parts:
            excite(inject_oft(getattr(pipe, part), config or OFTConfig(block_size=8), "a"), "a", seed=seed)
        known = AdapterMetadata(components={}, **metadata)
        return save_oft_weights(
            pipe, self.folder / f"{name}-{len(list(self.folder.iterdir()))}" / f"{name}.safetensors", "a", known
        )


def modules_of(pipe: Any) -> Iterable[tuple[str, nn.Module]]:
    for part, component in pipe.components.items():
        if isinstance(component, nn.Module):
            yield from ((f"{part}.{name}", module) for name, module in component.named_modules())


def fingerprint(pipe: Any) -> dict[str, Any]:
    """Everything that an adapter could change in a pipeline: classes, tensors, gradients, hooks, attributes."""
    found: dict[str, Any] = {}
    for name, module in modules_of(pipe):
        hooks = {
            key: [id(h) for h in value.values()] for key, value in module.__dict__.items() if key.endswith("_hooks")
        }
        tensors = {
            key: (t.detach().clone(), t.requires_grad, t.dtype, id(t))
            for key, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        found[name] = (id(module), type(module), module.training, sorted(module.__dict__), hooks, tensors)
    return found


def assert_unchanged(pipe: Any, before: Mapping[str, Any]) -> None:
    after = fingerprint(pipe)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name][:5] == before[name][:5], name
        assert after[name][5].keys() == before[name][5].keys()
        for key, (tensor, *rest) in before[name][5].items():
            assert after[name][5][key][1:] == tuple(rest), f"{name}.{key}"
            assert torch.equal(after[name][5][key][0], tensor), f"{name}.{key}"


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_loading_refused(
    pipe: Any, source: Any, *words: str, kind: type[OFTError] = AdapterFileError, **options: Any
) -> str:
    """Loading is refused in one sentence with these words, and nothing of it stays."""
    before, listed = fingerprint(pipe), list_oft_adapters(pipe)
    picture = draw(pipe) if listed else None
    with pytest.raises(kind) as error:
        load_oft_weights(pipe, source, **options)
    assert_one_sentence(error, *words)
    if listed:  # hooks of layers that only the refused adapter had may stay, and do nothing
        assert picture is not None
        assert torch.equal(draw(pipe), picture)
    else:
        assert_unchanged(pipe, before)
    assert list_oft_adapters(pipe) == listed
    return str(error.value)


def memory(entry: str) -> float:
    """Megabytes of this process, by an entry of /proc/self/status: "VmRSS" now, "VmHWM" at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{entry}:")]
    return int(line.split()[1]) / 1e3
