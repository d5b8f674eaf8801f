"""What a run holds for certain, counted on models without weights: parameters, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from oft_diffusion.gguf_file import gguf_bytes
from oft_diffusion.inject import inject_oft
from oft_diffusion.quantization import Scheme
from oft_diffusion.rotation import packed_size
from oft_diffusion.streaming import spared, streamed_layers
from oft_diffusion.text_encoders import last_hidden_state
from oft_diffusion.training.base import Base
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.precision import DTYPES, quantizing
from oft_diffusion.training.skeleton import adapted, skeleton

_FLOAT32 = 4  # bytes; generators, gradients, Adam's moments and what files hold are that


@dataclass(frozen=True)
class Counts:
    """Parameters of a run.

    Attributes:
        base: of the base.
        parts: bytes of the base's components, in the dtypes in which a run loads them.
        trained: of the adapter.
        saved: entries of the adapter file's tensors; more than `trained` with share_qkv, as files hold every layer's.
        moment_bytes: of Adam's two moments.
        streamed: of the base's bytes, those that wait off a card for their layers, but for two places there; about,
            where a file is quantized.
        arriving: bytes that bitsandbytes puts on a card before they are streamed from there, with what stays.
    """

    base: int
    parts: Mapping[str, int]
    trained: int
    saved: int
    moment_bytes: int
    streamed: int = 0
    arriving: int = 0

    @property
    def base_bytes(self) -> int:
        """Of the base."""
        return sum(self.parts.values())

    @property
    def adapter_bytes(self) -> int:
        """Of the generators."""
        return _FLOAT32 * self.trained

    @property
    def gradient_bytes(self) -> int:
        """Of their gradients."""
        return _FLOAT32 * self.trained

    @property
    def training_bytes(self) -> int:
        """Of their gradients and of Adam's two moments."""
        return self.gradient_bytes + self.moment_bytes

    @property
    def file_bytes(self) -> int:
        """Of the tensors in the adapter file, whose header comes on top."""
        return _FLOAT32 * self.saved


def count(config: TrainConfig, base: Base) -> Counts:
    """Count on the meta device, where nothing takes memory but the generators' zeros, for a moment.

    Raises:
        OFTError: as the checks before a run.
    """
    numbers = trained = saved = moments = streamed = arriving = 0
    weights: dict[str, int] = {}
    settings = adapted(config, base)
    quantized = quantizing(config, base)
    for name in base.modules:
        module = skeleton(base, name)
        numbers += sum(p.numel() for p in module.parameters())
        way = quantized.schemes.get(name) if quantized is not None else None
        dtype = torch.float32 if name == "vae" else DTYPES[config.mixed_precision]
        if name in base.denoisers and config.denoiser_file is not None:
            weights[name] = gguf_bytes(Path(config.denoiser_file), dtype)
        elif "quantization_config" in base.parts.get(name, {}):  # it was saved so, and lies in memory as in its files
            weights[name] = sum(path.stat().st_size for path in (base.weights / name).glob("*.safetensors"))
        else:
            weights[name] = _bytes_loaded(module, dtype, base, way)
        if name in base.denoisers and config.layer_offload:
            saved_so = base.parts.get(name, {}).get("quantization_config", {}).get("quant_method")
            library = saved_so or (way.package if way is not None else None)
            streamed += _streamed_bytes(module, config, None if saved_so else way, dtype, weights[name])
            arriving += weights[name] if library == "bitsandbytes" else 0
        if name in settings:
            used = last_hidden_state(base.pipeline, name, config.clip_skip or 0)
            bank = inject_oft(module, settings[name], ADAPTER, hidden_state=used)
            own = [p.numel() for p in bank.parameters()]
            trained += sum(own)
            moments += sum(2 * _moment_bytes(config, numel) for numel in own)
            parts = bank.adapters[ADAPTER].parts
            saved += sum(packed_size(part.block_size) * sum(part.blocks.values()) for part in parts)
    return Counts(numbers, weights, trained, saved, moments, streamed, arriving)


def _streamed_bytes(module: nn.Module, config: TrainConfig, way: Scheme | None, dtype: torch.dtype, loaded: int) -> int:
    """Of a denoiser, which is quantized in some way while it is loaded, or in its file, and so many bytes then."""
    numbers = spared([layer.weight.numel() for layer in streamed_layers(module, config.layer_offload)])
    if way is not None:
        return numbers * way.bits // 8
    every = sum(p.numel() for p in module.parameters())
    return min(numbers * dtype.itemsize, numbers * loaded // every)


def _moment_bytes(config: TrainConfig, numel: int) -> int:
    """Of one moment of a parameter: bitsandbytes' optimizer leaves small ones in float32."""
    if config.optimizer == "adamw" or numel < 4096:
        return _FLOAT32 * numel
    return numel + _FLOAT32 * math.ceil(numel / 256)


def _bytes_loaded(module: nn.Module, dtype: torch.dtype, base: Base, way: Scheme | None) -> int:
    """Of a component once it is loaded in a dtype, by its class's rules of what stays in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())  # transformers' alone
    # To whoever quantizes, in any dtype.
    plain = kept | set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if dtype == torch.float16 or (isinstance(module, ModelMixin) and not base.single_file):
        kept = plain
    total = 0
    for name, p in _loaded(module):
        if way is not None and _is_quantized(module, name, plain):
            out, columns = p.shape
            total += way.size(out, columns, dtype.itemsize)
        else:
            total += (dtype.itemsize if kept.isdisjoint(name.split(".")) else _FLOAT32) * p.numel()
    return total


def _is_quantized(module: nn.Module, name: str, plain: set[str]) -> bool:
    """Whether libraries quantize a parameter: the weights of linear layers, but for those a class has kept plain."""
    layer, _, leaf = name.rpartition(".")
    return leaf == "weight" and plain.isdisjoint(name.split(".")) and isinstance(module.get_submodule(layer), nn.Linear)


def _loaded(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a component's file holds: parameters, and tables of positions, of SD 3.5 Medium half a gigabyte."""
    yield from module.named_parameters()
    saved = module.state_dict().keys()
    yield from ((name, b) for name, b in module.named_buffers() if name in saved and b.is_floating_point())


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Of all that components' files hold. Other buffers are small."""
    return sum(tensor.nbytes for module in modules for _, tensor in _loaded(module))
