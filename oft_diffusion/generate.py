"""Seeded pictures from a pipeline, with the settings that made them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image
from PIL import Image

from oft_diffusion.errors import ConfigError, OFTError, first_line
from oft_diffusion.images import pictures_of
from oft_diffusion.load import check_clip_skip, clip_skip_mended
from oft_diffusion.pipeline import LoadedAdapter, list_oft_adapters, set_oft_adapters


@dataclass(frozen=True)
class Picture:
    """A picture and what made it, in plain JSON types, as `images.save_png` writes it."""

    image: Image.Image
    settings: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A denoising step that is done.

    Attributes:
        step: which, from 1.
        steps: of how many, of this batch.
        first: number of pictures that were drawn before this batch.
        pictures: of how many.
        latents: as they are now, in the pipeline's own layout; None where it does not tell.
    """

    step: int
    steps: int
    first: int
    pictures: int
    latents: torch.Tensor | None


def generate(
    pipe: Any,
    prompt: str | Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: str | None = None,
    steps: int = 25,
    guidance: float = 7.5,
    width: int | None = None,
    height: int | None = None,
    clip_skip: int | None = None,
    image: Image.Image | None = None,
    change: float = 0.6,
    batch_size: int = 4,
    on_picture: Callable[[Picture, int], object] | None = None,
    on_step: Callable[[Step], object] | None = None,
) -> list[Picture]:
    """One picture per seed. A seed gives the same noise whatever the batch or device (it is drawn on the CPU).

    Args:
        pipe: a text-to-image pipeline, with or without adapters.
        prompt: what to draw, for all pictures or one each.
        seeds: one per picture.
        negative_prompt: what not to draw, where the pipeline knows such.
        steps: denoising steps.
        guidance: classifier-free guidance scale as the pipeline counts it; none is 0 for Krea 2 and Z-Image, else 1.
        width: in pixels, together with height; the pipeline's own size if both are None.
        height: likewise.
        clip_skip: layers at the end of CLIP that are left out, as diffusers counts (1 is others' clip skip 2).
        image: a picture to begin with, where the pipeline has an image-to-image twin; resized to width and height.
        change: of that picture, how much: 0 keeps it, 1 is as without it; of `steps` that share is done.
        batch_size: pictures per call of the pipeline.
        on_picture: called with (picture, of how many) as soon as its batch is drawn.
        on_step: called after each denoising step, where the pipeline tells of them; what it raises ends the call, and
            leaves the pipeline usable.

    Returns:
        Pictures in the order of seeds.

    Raises:
        ConfigError: the pipeline refuses a setting (a size that its VAE cannot divide, too many steps, ...), or it
            cannot begin with a picture.
    """
    if (width is None) != (height is None) or not all(side is None or side > 0 for side in (width, height)):
        # diffusers takes its own size for both where one is missing or 0, without a word
        raise ConfigError(
            f"width={width} and height={height} make no size",
            expected="both, in pixels, or neither",
            fix="give both",
        )
    drawn_from: dict[str, Any] = {}
    if image is not None:
        pipe, drawn_from = _from_image(pipe, image, change, width, height)
        width = height = None
    extra = _extra(pipe, width, height, clip_skip) | drawn_from
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else list(prompt)
    shared = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance": guidance,
        **({} if clip_skip is None else {"clip_skip": clip_skip}),
        **({} if image is None else {"change": change}),
        "scheduler": type(pipe.scheduler).__name__,
        "model": str(getattr(pipe.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2],
        "adapters": [_described(a) for a in list_oft_adapters(pipe) if a.strength],
    }
    pictures: list[Picture] = []
    for start in range(0, len(seeds), batch_size):
        batch, asked = seeds[start : start + batch_size], prompts[start : start + batch_size]
        try:
            with clip_skip_mended(pipe):
                output = pipe(
                    prompt=asked,  # Flux.2 takes pictures first
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in batch],
                    **_guided(pipe, guidance, negative_prompt, len(batch)),
                    **_told(pipe, on_step, start, len(seeds)),
                    **extra,
                )
        except OFTError:
            raise
        except ValueError as error:  # what diffusers raises on settings that it checks
            raise ConfigError(
                f"the pipeline refuses these settings ({first_line(error)})",
                expected="a seed, a size and a number of steps that it can take",
                fix="change the setting that the message names",
            ) from error
        for text, seed, image in zip(asked, batch, pictures_of(output), strict=True):
            own = {"seed": seed, "width": image.width, "height": image.height}
            pictures.append(Picture(image, {"prompt": text, **shared, **own}))
            if on_picture is not None:
                on_picture(pictures[-1], len(seeds))
    return pictures


def _from_image(
    pipe: Any, image: Image.Image, change: float, width: int | None, height: int | None
) -> tuple[Any, dict[str, Any]]:
    """The pipeline's twin that begins with a picture, with the same components, and what only it is told."""
    if not 0.0 < change <= 1.0:
        raise ConfigError(f"change={change} is no share", expected="more than 0, at most 1", fix="correct it")
    try:
        twin = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ConfigError(
            f"a {type(pipe).__name__} cannot begin with a picture",
            expected="a pipeline with an image-to-image twin in diffusers",
            fix="leave the picture out",
        ) from error
    twin.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    size = (width, height) if width and height else image.size
    return twin, {"image": image.convert("RGB").resize(size, Image.Resampling.LANCZOS), "strength": change}


def _told(pipe: Any, on_step: Callable[[Step], object] | None, first: int, count: int) -> dict[str, Any]:
    """What has the pipeline call back, where it can."""
    known = inspect.signature(type(pipe).__call__).parameters
    if on_step is None:
        return {}

    def tell(index: int, steps: int, latents: torch.Tensor | None) -> None:
        try:
            on_step(Step(index + 1, steps, first, count, latents))
        except BaseException:
            pipe.maybe_free_model_hooks()  # as it would have done at its end
            raise

    def after(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tell(index, pipe.num_timesteps, tensors.get("latents"))
        return {}

    def formerly(index: int, _: Any, latents: torch.Tensor) -> None:
        scheduler = pipe.scheduler  # which passes twice through each step where its order is 2
        tell(index, -(-len(scheduler.timesteps) // scheduler.order), latents)

    if "callback_on_step_end" in known:
        return {"callback_on_step_end": after}
    return {"callback": formerly, "callback_steps": 1} if "callback" in known else {}  # PixArt's


def _extra(pipe: Any, width: int | None, height: int | None, clip_skip: int | None) -> dict[str, Any]:
    """What only some calls, or some pipelines, are told."""
    known = inspect.signature(type(pipe).__call__).parameters
    extra: dict[str, Any] = {"num_frames": 1} if "num_frames" in known else {}
    if clip_skip is not None:
        clips = [e for name, e in pipe.components.items() if name.startswith("text_encoder") and _is_clip(e)]
        check_clip_skip(type(pipe), clip_skip, min((e.config.num_hidden_layers for e in clips), default=0))
        extra["clip_skip"] = clip_skip
    if width is not None:
        extra |= {"width": width, "height": height}
        if "use_resolution_binning" in known:
            extra["use_resolution_binning"] = False  # what was asked for, not the nearest size that was trained
    return extra


def _is_clip(encoder: Any) -> bool:
    return type(encoder).__name__.startswith("CLIPText")


def _guided(pipe: Any, guidance: float, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """Guidance and what not to draw, as the pipeline calls them.

    Raises:
        ConfigError: a negative prompt would do nothing.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    embedded = "true_cfg_scale" in known and getattr(known.get("guidance_scale"), "default", None) is not None
    if negative_prompt and ("negative_prompt" not in known or embedded):
        raise ConfigError(
            f"a negative prompt does nothing to a {type(pipe).__name__}",
            expected="none where guidance is embedded or distilled",
            fix="leave it out",
        )
    if "true_cfg_scale" in known and not embedded:  # Qwen-Image's, which needs a negative prompt, not the empty one
        guided: dict[str, Any] = {"true_cfg_scale": guidance}
        negative_prompt = negative_prompt or (" " if guidance > 1 else None)
    else:
        guided = {"guidance_scale": guidance} if "guidance_scale" in known else {}
    return guided | ({"negative_prompt": [negative_prompt] * count} if negative_prompt else {})


def compare(
    pipe: Any,
    adapter_name: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    strengths: Sequence[float] = (0.0, 1.0),
    on_row: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[list[Picture]]:
    """The same prompts and seeds at several strengths; strength 0 is the base, bit for bit.

    Args:
        pipe: a pipeline with the adapter; left with this adapter alone active, at the last strength.
        adapter_name: which.
        prompts: one row each.
        seeds: pictures per prompt and strength.
        strengths: groups within a row.
        on_row: called with (rows done, of how many).
        **options: for `generate`.

    Returns:
        One row per prompt: all seeds at the first strength, then all at the second, and so on.
    """
    rows = []
    for index, prompt in enumerate(prompts, 1):
        row: list[Picture] = []
        for strength in strengths:
            set_oft_adapters(pipe, adapter_name, strength)
            row += generate(pipe, prompt, seeds, **options)
        rows.append(row)
        if on_row is not None:
            on_row(index, len(prompts))
    return rows


def _described(adapter: LoadedAdapter) -> dict[str, Any]:
    """What a picture says of an adapter; the digest finds the file again whatever it is called by then."""
    known = {"name": adapter.name, "strength": adapter.strength, "mode": adapter.mode}
    return known | ({"sha256": adapter.metadata.sha256} if adapter.metadata else {})
