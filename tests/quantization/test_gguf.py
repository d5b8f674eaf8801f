"""GGUF beyond a UNet in the usual kinds: llama.cpp's K kinds, and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oft_diffusion import OFTConfig, inject_oft, load_oft_weights, merge_oft
from oft_diffusion.errors import TargetError
from oft_diffusion.load import load_pipeline
from oft_diffusion.quantized import quantized_weight
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.count import count
from oft_diffusion.training.find import find_base
from tests.core.reference import relative
from tests.helpers.tiny_families import side_of, write_tiny_family
from tests.library.support import assert_one_sentence, excite
from tests.quantization.backends import bytes_held, contents, quantized_layers, write_gguf

# Where the float16 scales of a block of 256 lie, in its bytes.
K_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def k_bytes(kind: str, rows: int, blocks: int) -> np.ndarray[Any, Any]:
    """Random bytes that mean numbers: `gguf` reads K kinds, and writes none."""
    import gguf

    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(0)
    made = random.integers(0, 256, (rows, blocks, size), np.uint8)
    for place in K_SCALES[kind]:
        scales = random.uniform(0.001, 0.003, (rows, blocks, 1)).astype(np.float16)
        made[:, :, place : place + 2] = scales.view(np.uint8)
    return made.reshape(rows, blocks * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", K_SCALES)
def test_k_kinds_below_an_adapter(kind: str, dtype: torch.dtype) -> None:
    """Answer and gradients are of what the layer multiplies by, which is gguf's own reading of the file but for
    float16's rounding; merging is refused, and changes nothing."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    torch.manual_seed(0)
    written, quant = k_bytes(kind, 32, 2), gguf.GGMLQuantizationType[kind]
    layer = GGUFLinear(512, 32, bias=False, compute_dtype=dtype)
    layer.weight = GGUFParameter(torch.from_numpy(written), quant_type=quant)
    plain = nn.Linear(512, 32, bias=False, dtype=torch.float32)
    weight = quantized_weight(layer)
    assert weight is not None
    plain.weight.data = weight.values(torch.float32)
    assert relative(plain.weight.data, torch.from_numpy(gguf.quants.dequantize(written, quant))) < 0.01
    x, found = torch.randn(5, 512), []
    model = nn.Sequential(layer)
    for module, own in ((model, dtype), (nn.Sequential(plain), torch.float32)):
        bank = inject_oft(module, OFTConfig(block_size=16, targets="0"))
        excite(bank, norm=0.3)
        given = x.to(own).requires_grad_()
        out = module(given)
        found.append((out.float(), *torch.autograd.grad(out.float().square().mean(), [given, *bank.parameters()])))
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for made, wanted in zip(*found, strict=True):
        assert relative(made.float(), wanted) < bound
    before = layer.weight.as_tensor().clone()
    with pytest.raises(TargetError) as error:
        merge_oft(model)
    assert_one_sentence(error, "GGUFLinear", kind)
    assert torch.equal(layer.weight.as_tensor(), before)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_transformers(name: str, pictures: Path, tmp_path: Path) -> None:
    """Under diffusers' own names: its conversion of native ones knows the real widths alone."""
    model = write_tiny_family(name, tmp_path)
    file = write_gguf(model, tmp_path / "transformer.gguf")
    config = TrainConfig.from_dict({
        "model": str(model), "instance_dir": str(pictures), "trigger": "sks", "class_word": "mug",
        "output_dir": str(tmp_path / "run"), "resolution": side_of(name), "block_size": 8, "steps": 3,
        "learning_rate": 0.1, "validation_prompts": [], "mixed_precision": "bf16", "denoiser_file": str(file),
        "text_encoder_quantization": "int8",
    })  # fmt: skip
    with train(config, progress=False) as run:
        assert run.parts is not None
        family = run.parts.family
        denoiser = family.module("transformer")
        assert quantized_layers(denoiser)
        before = contents(denoiser)
        held = sum(bytes_held(family.module(part)) for part in family.base.modules)
        for _ in run:
            pass
        after = contents(denoiser)
    assert all(torch.equal(before[key], after[key]) for key in before), "training changed the base"
    assert run.result.silent_layers == ()
    assert count(config, find_base(str(model), None)).base_bytes == pytest.approx(held, rel=0.01)
    pipe = load_pipeline(model, torch.bfloat16, denoiser_file=file)
    assert load_oft_weights(pipe, run.result.adapter).components
