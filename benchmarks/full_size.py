"""Pipelines of the real sizes with random weights, as folders in diffusers' format: what memory is measured with.

Pictures of them are noise; bytes and layers are those of the models that people train. Tokenizers are the tests' small
ones, whose tokens all are in the real vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from benchmarks import works
from benchmarks.works import Sizes
from tests.helpers.tiny_families import t5_tokenizer
from tests.helpers.tiny_sd import tiny_tokenizer


@dataclass(frozen=True)
class Whole:
    """A base.

    Attributes:
        pipeline: its diffusers class.
        resolution: that it was made for, in pixels.
        modules: makes its components with weights, by name.
        scheduler: makes the last one.
        more: arguments of the pipeline's class.
    """

    pipeline: str
    resolution: int
    modules: Callable[[], dict[str, Any]]
    scheduler: Callable[[], Any]
    more: tuple[tuple[str, Any], ...] = ()


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _vae(channels: int, side: int, **more: Any) -> Any:
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        latent_channels=channels, sample_size=side, **more,
    )  # fmt: skip


def _flow_vae(scale: float, shift: float) -> Any:
    unused: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False}
    return _vae(16, 1024, scaling_factor=scale, shift_factor=shift, **unused)


def _t5_xxl() -> Any:
    return T5EncoderModel(
        T5Config(
            d_model=4096, d_ff=10240, num_heads=64, d_kv=64, num_layers=24, vocab_size=32128,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def sd3_large() -> Any:
    """Stable Diffusion 3.5 Large."""
    return SD3Transformer2DModel(
        sample_size=128, num_layers=38, attention_head_dim=64, num_attention_heads=38, joint_attention_dim=4096,
        caption_projection_dim=2432, pooled_projection_dim=2048, in_channels=16, out_channels=16, qk_norm="rms_norm",
        pos_embed_max_size=192,
    )  # fmt: skip


def _sd15_modules() -> dict[str, Any]:
    unet = works.sd15(Sizes()).denoiser
    return {"unet": unet, "text_encoder": works.clip_l(-1), "vae": _vae(4, 512, scaling_factor=0.18215)}


def _sdxl_modules() -> dict[str, Any]:
    unet = works.sdxl(Sizes()).denoiser
    encoders = {"text_encoder": works.clip_l(-2), "text_encoder_2": works.clip_g(-2)}
    return {"unet": unet, **encoders, "vae": _vae(4, 1024, scaling_factor=0.13025)}


def _sd3_modules(transformer: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        clips = {"text_encoder": works.clip_l(-2, projection=True), "text_encoder_2": works.clip_g(-2)}
        return {"transformer": transformer(), **clips, "text_encoder_3": _t5_xxl(), "vae": _flow_vae(1.5305, 0.0609)}

    return made


def _flux_modules() -> dict[str, Any]:
    encoders = {"text_encoder": works.clip_l(-1), "text_encoder_2": _t5_xxl()}
    return {"transformer": works.flux(Sizes()).denoiser, **encoders, "vae": _flow_vae(0.3611, 0.1159)}


def _diffusion() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def _flow(**more: Any) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **more)


_SAFE = (("safety_checker", None), ("feature_extractor", None), ("requires_safety_checker", False))
FULL_SIZE: dict[str, Whole] = {
    "SD 1.5": Whole("StableDiffusionPipeline", 512, _sd15_modules, _diffusion, _SAFE),
    "SDXL": Whole("StableDiffusionXLPipeline", 1024, _sdxl_modules, _diffusion),
    "SD 3.5 Medium": Whole(
        "StableDiffusion3Pipeline", 1024, _sd3_modules(lambda: works.sd35(Sizes()).denoiser), _flow()
    ),
    "SD 3.5 Large": Whole("StableDiffusion3Pipeline", 1024, _sd3_modules(sd3_large), _flow()),
    "Flux.1": Whole("FluxPipeline", 1024, _flux_modules, _flow(use_dynamic_shifting=True)),
}


def full_size(name: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The components with weights, by name: random ones, or none on the device "meta"."""
    with _made_on(device, dtype), torch.no_grad():
        return FULL_SIZE[name].modules()


def write_full_size(name: str, folder: Path, device: str) -> Path:
    """Write a pipeline in bfloat16, made on that device, as `folder/name`."""
    whole, modules = FULL_SIZE[name], full_size(name, device, torch.bfloat16)
    clip, t5 = tiny_tokenizer(folder / "tokenizer_files"), t5_tokenizer()
    tokenizers = {
        part.replace("text_encoder", "tokenizer"): t5 if isinstance(module, T5EncoderModel) else clip
        for part, module in modules.items()
        if part.startswith("text_encoder")
    }
    kind: Any = getattr(diffusers, whole.pipeline)
    kind(**modules, **tokenizers, scheduler=whole.scheduler(), **dict(whole.more)).save_pretrained(folder / name)
    return folder / name


def write_stub(name: str, folder: Path) -> Path:
    """A base of full size without its weights: configs, tokenizers, and files that hold a number each."""
    whole, model = FULL_SIZE[name], folder / "model"
    told: dict[str, Any] = {"_class_name": whole.pipeline, "scheduler": ["diffusers", type(whole.scheduler()).__name__]}
    for part, module in full_size(name, "meta", torch.bfloat16).items():
        library = "transformers" if part.startswith("text_encoder") else "diffusers"
        (module.save_config if library == "diffusers" else module.config.save_pretrained)(model / part)
        save_file({"x": torch.zeros(1)}, model / part / "model.safetensors")
        told[part] = [library, type(module).__name__]
        if library == "transformers":
            tokenizer = t5_tokenizer() if "T5" in type(module).__name__ else tiny_tokenizer(folder / "files")
            own = part.replace("text_encoder", "tokenizer")
            tokenizer.save_pretrained(model / own)
            told[own] = ["transformers", type(tokenizer).__name__]
    whole.scheduler().save_pretrained(model / "scheduler")
    (model / "model_index.json").write_text(json.dumps(told))
    return model
