"""The page that every finished run writes: pictures before and after, strengths, losses, settings, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from oft_diffusion.errors import AdapterError
from oft_diffusion.images import labelled_grid
from oft_diffusion.report import Figure, Table, write_report
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import Picture, read_picture
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.prepare import Parts
from oft_diffusion.training.results import REPORT, TrainResult

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
_SWEEP_SEEDS = 2
_CELL = 128


def strength_sweep(parts: Parts, config: TrainConfig) -> Image.Image | None:
    """The first validation prompt at several strengths, a row per seed; the adapter is at strength 1 again afterwards.

    None where the adapter knows no such strengths (a series past the norm at which powers are defined).
    """
    prompts = [config.fill(config.validation_prompts[0])] * _SWEEP_SEEDS
    seeds = [config.seed + i for i in range(_SWEEP_SEEDS)]
    how = (config.resolution, config.sampling_steps, config.guidance_scale)
    columns = []
    try:
        for strength in STRENGTHS:
            for bank in parts.banks.values():
                bank.set_adapters([ADAPTER], strength)
            columns.append(parts.family.sample(prompts, seeds, *how))
    except AdapterError:
        return None
    finally:
        for bank in parts.banks.values():
            bank.set_adapters([ADAPTER])
    rows = [list(row) for row in zip(*columns, strict=True)]
    labels = [f"strength {strength:g}" for strength in STRENGTHS]
    return labelled_grid(rows, column_labels=labels, cell=max(_CELL, config.resolution))


def write_summary(
    parts: Parts,
    config: TrainConfig,
    result: TrainResult,
    instances: Sequence[Picture],
    *,
    sections: Sequence[Figure | Table] = (),
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write `report.html` into output_dir.

    Args:
        parts: of the run, still loaded.
        config: its settings.
        result: what it left.
        instances: the instance images.
        sections: more of them, before the loss curve.
        facts: more of them, at the top.

    Returns:
        The page's path.
    """
    trigger = f"{config.trigger} {config.class_word}"
    shown = [
        Figure("The subject", "All that was shown to it.", {f"Instance images of {trigger}": _thumbnails(instances)})
    ]
    grids = [path for path in result.pictures if not path.stem.endswith("-own")]
    if len(grids) > 1:
        first, last = (Image.open(grids[i]).convert("RGB") for i in (0, -1))
        what = f"The same prompts and seeds: first as the base draws them, then after {result.steps} steps."
        shown.append(Figure("Before and after", what, {"Grid before training": first, "Grid after training": last}))
    if config.validation_prompts and (sweep := strength_sweep(parts, config)) is not None:
        what = (
            f'"{config.fill(config.validation_prompts[0])}" with the rotations raised to a power: 0 is the base, 1 as '
            "trained, -1 the inverse."
        )
        shown.append(Figure("Strength", what, {"The prompt at strengths from -1 to 1.5": sweep}))
    parameters = sum(p.numel() for bank in parts.banks.values() for p in bank.parameters())
    error = max(bank.orthogonality_error(ADAPTER) for bank in parts.banks.values())
    about = {
        "adapter size": f"{result.adapter.stat().st_size / 1e6:.2f} MB",
        "parameters": f"{parameters:,}",
        "training": _duration(result.seconds),
        "steps": result.steps,
        "orthogonality error": f"{error:.0e}",
    }
    return write_report(
        Path(config.output_dir) / REPORT,
        title=f"{trigger}: a DreamBooth run",
        lead=(
            f"OFTv2 taught {Path(config.model).name} the words “{trigger}” from {len(instances)} pictures. The base's "
            "weights are as they were: the adapter rotates what flows into its layers."
        ),
        sections=[*shown, *sections],
        losses=result.losses,
        facts={**about, **(facts or {})},
        settings=config.to_dict(),
        usage=_usage(config, result.adapter),
    )


def _thumbnails(instances: Sequence[Picture]) -> Image.Image:
    return labelled_grid([[read_picture(picture.path) for picture in instances[:8]]], cell=_CELL)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _usage(config: TrainConfig, adapter: Path) -> str:
    return (
        "from diffusers import StableDiffusionPipeline\n"
        "from oft_diffusion import load_oft_weights, set_oft_adapters\n\n"
        f'pipe = StableDiffusionPipeline.from_pretrained("{config.model}")\n'
        f'load_oft_weights(pipe, "{adapter}", adapter_name="mine")\n'
        f'prompt = "{config.fill(config.instance_prompt)}"\n'
        f"image = pipe(prompt, guidance_scale={config.guidance_scale}).images[0]\n"
        'set_oft_adapters(pipe, ["mine"], [0.7])  # weaker; 0 is the base\n'
    )
