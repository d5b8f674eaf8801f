"""What is tested of each way to quantize: the matrix in docs/quantization.md has a tick where a test ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from oft_diffusion.quantization import SCHEMES
from oft_diffusion.quantized import QuantizedWeight, quantized_weight
from oft_diffusion.training import TrainConfig
from tests.helpers.single_files import unet_name
from tests.helpers.tiny_sd import RESOLUTION

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_A_PROCESSOR = tuple(name for name, way in SCHEMES.items() if not way.needs_cuda)
GGUF = "gguf"
GGUF_4_BITS = f"{GGUF} Q4_0"  # a file of another kind than the usual one
BACKENDS = (
    *(name for name, way in SCHEMES.items() if way.trains and (DEVICE == "cuda" or not way.needs_cuda)),
    GGUF,
    GGUF_4_BITS,
)
STEPS = ("train", "save", "load", "merge", "unmerge")


def settings(backend: str, model: Path, pictures: Path, folder: Path, **knobs: Any) -> TrainConfig:
    """A few steps on the tiny base, denoiser and text encoder quantized and adapted."""
    own = denoiser_knobs(backend, model, folder)
    if "quantization" in own:
        own["text_encoder_quantization"] = backend
    small: dict[str, Any] = {
        "model": str(model), "instance_dir": str(pictures), "trigger": "sks", "class_word": "mug",
        "output_dir": str(folder / "run"), "resolution": RESOLUTION, "block_size": 16, "steps": 4,
        "learning_rate": 0.05, "sampling_steps": 2, "validation_prompts": ["a {trigger} {class_word}"],
        "validation_count": 1, "checkpoint_every": 2, "mixed_precision": "bf16", "text_encoder": True,
    }  # fmt: skip
    return TrainConfig.from_dict(small | own | knobs)


def denoiser_knobs(backend: str, model: Path, folder: Path) -> dict[str, Any]:
    """What has a denoiser quantized so, of settings and of `load_pipeline`; a GGUF file is written for it."""
    if backend.startswith(GGUF):
        return {"denoiser_file": str(write_gguf(model, folder / "unet.gguf", *backend.split()[1:]))}
    return {"quantization": backend}


def write_gguf(model: Path, path: Path, kind: str = "Q8_0") -> Path:
    """The denoiser of a folder as a GGUF file, linear layers of whole blocks quantized; a UNet under first names."""
    import gguf

    part = "unet" if (model / "unet").is_dir() else "transformer"
    denoiser: Any = getattr(DiffusionPipeline.from_pretrained(model), part)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "sd1")
    whole, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    linear = {
        f"{name}.weight"
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features % whole == 0
    }
    for name, tensor in denoiser.state_dict().items():
        array = np.ascontiguousarray(tensor.float().numpy())
        quantized = gguf.GGMLQuantizationType[kind] if name in linear else gguf.GGMLQuantizationType.F32
        own = gguf.quants.quantize(array, quantized)
        key = f"model.diffusion_model.{unet_name(name, denoiser)}" if part == "unet" else name
        writer.add_tensor(key, own, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized_layers(module: nn.Module) -> dict[str, QuantizedWeight]:
    named = ((name, quantized_weight(layer)) for name, layer in module.named_modules())
    return {name: weight for name, weight in named if weight is not None}


def contents(module: nn.Module) -> dict[str, Tensor]:
    """Every byte of a component's quantized weights."""
    layers = quantized_layers(module).items()
    return {f"{name}/{part}": raw(tensor) for name, weight in layers for part, tensor in weight.tensors().items()}


def bytes_held(module: nn.Module) -> int:
    """Of all parameters, quantized weights with their scales, and of tables that its file holds."""
    plain: dict[int, int] = {}  # by identity: tied ones count once
    quantized = 0
    for layer in module.modules():
        weight = quantized_weight(layer)
        own = [p for key, p in layer._parameters.items() if p is not None and not (weight and key == "weight")]
        plain |= {id(parameter): parameter.nbytes for parameter in own}
        quantized += sum(tensor.nbytes for tensor in weight.tensors().values()) if weight else 0
    saved = _saved(module)
    tables = sum(b.nbytes for name, b in module.named_buffers() if name in saved and b.is_floating_point())
    return sum(plain.values()) + quantized + tables


def _saved(module: nn.Module) -> set[str]:
    """Names of buffers that a file of the component holds."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, layer in module.named_modules()
        for name in layer._buffers.keys() - layer._non_persistent_buffers_set
    }


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().reshape(-1).contiguous().view(torch.uint8)


def dequantized(module: nn.Module, dtype: torch.dtype) -> None:
    """Put plain layers in the place of quantized ones."""
    for name, weight in quantized_layers(module).items():
        plain = nn.Linear(weight.layer.in_features, weight.layer.out_features, weight.layer.bias is not None)
        plain.weight = nn.Parameter(weight.dequantized())
        if weight.layer.bias is not None:
            plain.bias = nn.Parameter(weight.layer.bias.detach().float())
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, plain.to(dtype).requires_grad_(False))
