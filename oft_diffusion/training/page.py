"""The page that every finished run writes: pictures before and after, strengths, losses, settings, how to load it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from oft_diffusion.errors import AdapterError, OFTError
from oft_diffusion.evaluation import Looks, evaluate
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.images import labelled_grid, read_picture, read_settings
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.report import Pictures, Section, Table, write_report
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import Picture
from oft_diffusion.training.families import Family
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.prepare import Parts
from oft_diffusion.training.results import EVALUATION, PAGE, Console, TrainResult

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
_SWEEP_SEEDS = 2
_CELLS = (128, 256)  # smallest and largest side of a picture on the page
# What docs/evaluation.md says at length, for readers who have the page alone.
_SHARES = (
    "A subject hit shows the subject's object and all its attributes that no caption names; prompt fidelity is to show "
    "everything that the prompt names; leakage is a hit without the trigger; memorisation is a picture that is nearer "
    "to an instance image than the two most alike of these are to each other."
)
_DIFFERENCES = (
    "With the adapter less without it, pair by pair, in points; 0 is what the base does. Preservation: pictures of "
    "prompts without the subject that show everything that the prompt names. Attribute drift: attributes of the "
    "subject, four to a picture, that turn up where nobody asked for them."
)


def write_page(
    parts: Parts,
    config: TrainConfig,
    result: TrainResult,
    instances: Sequence[Picture],
    sections: Sequence[Section] = (),
    *,
    looks: Looks | None,
    console: Console,
    stopped: Callable[[], bool],
) -> Path:
    """Write `report.html` into output_dir, and `evaluation.json` where there are figures.

    Args:
        parts: of the run, still loaded.
        config: its settings.
        result: what it left.
        instances: the instance images with their prompts.
        sections: more of them, before the loss curve.
        looks: the subject's, for figures; none if None.
        console: shows a bar while pictures are measured, and the figures.
        stopped: asked between pictures; once it is true, the sweep and the figures are left out.

    Returns:
        The page's path.

    Raises:
        AdapterFileError: the page cannot be written.
    """
    words = f"{config.trigger} {config.class_word}"
    shown: list[Section] = [_instances(instances, words)]
    shown += _before_and_after(config, result)
    if config.validation_prompts and (columns := strength_sweep(parts, config, stopped)) is not None:
        shown.append(_strengths(columns, config))
    figures = _figures(parts, config, looks, console, stopped) if looks else []
    parameters = sum(p.numel() for bank in parts.banks.values() for p in bank.parameters())
    error = max(bank.orthogonality_error(ADAPTER) for bank in parts.banks.values())
    return write_report(
        Path(config.output_dir) / PAGE,
        title=f"{words}: a DreamBooth run",
        lead=(
            f"OFTv2 taught the base the words “{words}” from {len(instances)} pictures. The base's weights are as they "
            "were: the adapter rotates what flows into its layers."
        ),
        sections=[*shown, *sections, *figures],
        losses=result.losses,
        facts={
            "adapter size": f"{result.adapter.stat().st_size / 1e6:.2f} MB",
            "parameters": f"{parameters:,}",
            "training": f"{result.seconds:.0f} s" if result.seconds < 90 else f"{result.seconds / 60:.1f} min",
            "steps": result.steps,
            "orthogonality error": f"{error:.0e}",
        },
        settings=config.to_dict(),
        usage=_usage(config, parts.family, result.adapter),
    )


def pictures_on_page(config: TrainConfig) -> int:
    """How many pictures `write_page` draws, if nobody stops it."""
    sweep = len(STRENGTHS) * _SWEEP_SEEDS if config.validation_prompts else 0
    return sweep + _figure_pictures(config)


def _figure_pictures(config: TrainConfig) -> int:
    return 2 * config.evaluation_count * len(SETS)  # with and without the adapter


def strength_sweep(
    parts: Parts, config: TrainConfig, stopped: Callable[[], bool] = lambda: False
) -> dict[float, list[Image.Image]] | None:
    """The first validation prompt at several strengths, a picture per seed; afterwards the adapter is at strength 1.

    No more are drawn at once than a grid has: where memory is short, that one is narrow.
    Strengths that the adapter does not know are left out (a series past the norm at which powers are defined). None
    where `stopped` said so.
    """
    prompts = [config.fill(config.validation_prompts[0])] * _SWEEP_SEEDS
    seeds = [config.seed + i for i in range(_SWEEP_SEEDS)]
    how = (config.resolution, config.sampling_steps, config.guidance_scale)
    at_once = min(_SWEEP_SEEDS, config.validation_count)
    columns: dict[float, list[Image.Image]] = {}
    try:
        for strength in STRENGTHS:
            if stopped():
                return None
            with suppress(AdapterError):  # raised where the strength is built, at the latest in the first forward
                for bank in parts.banks.values():
                    bank.set_adapters([ADAPTER], strength)
                columns[strength] = parts.family.sample(prompts, seeds, *how, at_once)
    finally:
        for bank in parts.banks.values():
            bank.set_adapters([ADAPTER])
    return columns


def _strengths(columns: Mapping[float, Sequence[Image.Image]], config: TrainConfig) -> Pictures:
    prompt, told = _quoted([config.fill(config.validation_prompts[0])]), ", ".join(f"{s:g}" for s in columns)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    sheet = labelled_grid(rows, column_labels=[f"strength {s:g}" for s in columns], cell=_cell(config))
    text = (
        f"{prompt} with the rotations raised to a power: 0 is the base, 1 as trained, -1 the inverse. From left to "
        f"right {told}; a row per seed."
    )
    alt = f"{prompt} in {len(rows)} rows of one seed each, from left to right at strengths {told}"
    return Pictures("Strength", text, {alt: sheet})


def _figures(
    parts: Parts, config: TrainConfig, looks: Looks, console: Console, stopped: Callable[[], bool]
) -> list[Section]:
    """The evaluation's table, whose rows go to `evaluation.json`; nothing where `stopped` said so."""
    count = config.evaluation_count
    bar = iter(console.track(range(_figure_pictures(config)), "measuring"))

    def on_picture() -> None:
        next(bar, None)
        if stopped():
            raise _StopError

    try:
        with parts.family.pipeline() as pipe:
            found = evaluate(
                pipe, ADAPTER, classifier=load_classifier(str(pipe.device)), looks=looks, trigger=config.trigger,
                count=count, steps=config.sampling_steps, guidance=config.guidance_scale, on_picture=on_picture,
            )  # fmt: skip
    except _StopError:
        return []
    finally:
        for bank in parts.banks.values():
            bank.set_adapters([ADAPTER])
    next(bar, None)  # lets the bar go
    console.say(found.text())
    found.save(Path(config.output_dir) / EVALUATION)
    read = (
        f"Read by a classifier in {count} {'pictures' if count > 1 else 'picture'} per line and side, from the same "
        "prompts and seeds. In brackets the 95 % interval: all that so many pictures can tell."
    )
    (_, *sides), *shares = found.shares()
    (_, *points), *differences = found.differences()
    return [
        Table("Figures: shares of pictures", f"{read} {_SHARES}", ["", *sides], shares),
        Table("Figures: differences to the base", _DIFFERENCES, ["", *points], differences),
    ]


class _StopError(Exception):
    """Ctrl-C while pictures are measured."""


def _instances(instances: Sequence[Picture], words: str) -> Pictures:
    row = [read_picture(picture.path) for picture in instances[:8]]
    told = _quoted(dict.fromkeys(picture.prompt for picture in instances))
    alt = f"Instance images of {words}, {len(row)} in a row"
    return Pictures("The subject", f"All that was shown and told: {told}.", {alt: labelled_grid([row], cell=_CELLS[0])})


def _before_and_after(config: TrainConfig, result: TrainResult) -> list[Section]:
    """The first and the last grid, if the first is of the base, and both are of today's prompts."""
    grids = {}
    for path in result.pictures:
        try:
            noted = read_settings(path)
        except OFTError:
            continue
        if noted.get("prompts") == [config.fill(prompt) for prompt in config.validation_prompts]:
            grids[int(noted["step"])] = path
    if 0 not in grids or len(grids) < 2 or config.init_adapter is not None:
        return []
    last = max(grids)
    first, latest = (Image.open(grids[step]).convert("RGB") for step in (0, last))
    prompts = _quoted(map(config.fill, config.validation_prompts))
    text = f"The same prompts and seeds, as the base draws them and after {last} steps. From top to bottom: {prompts}."
    captions = ["Before training", f"After {last} steps"]
    alts = [f"{caption}, a row per prompt: {prompts}" for caption in captions]
    return [Pictures("Before and after", text, dict(zip(alts, (first, latest), strict=True)), captions)]


def _quoted(prompts: Iterable[str]) -> str:
    return "; ".join(f"“{prompt}”" for prompt in prompts)


def _cell(config: TrainConfig) -> int:
    return min(max(config.resolution, _CELLS[0]), _CELLS[1])


def _usage(config: TrainConfig, family: Family, adapter: Path) -> str:
    kind = family.base.pipeline
    single = Path(config.model).suffix == ".safetensors"
    load = (
        f"from_single_file({config.model!r}, config={config.config_dir!r})"
        if single
        else f"from_pretrained({config.model!r})"
    )
    how = {"num_inference_steps": config.sampling_steps, **family.call, **family.guided(config.guidance_scale)}
    told = "".join(f", {name}={value!r}" for name, value in how.items())
    draw = f"image = pipe(prompt=prompt{told}){'.frames[0][0]' if 'num_frames' in how else '.images[0]'}\n"
    if config.clip_skip is not None:  # which diffusers alone cannot do everywhere
        told = f"steps={config.sampling_steps}, guidance={config.guidance_scale}, clip_skip={config.clip_skip}"
        draw = f"[picture] = generate(pipe, prompt, [0], {told})\nimage = picture.image\n"
    return (
        f"from diffusers import {kind}\n"
        "from oft_diffusion import load_oft_weights, set_oft_adapters\n"
        f"{'from oft_diffusion.generate import generate' if config.clip_skip else ''}\n"
        f"pipe = {kind}.{load}\n"
        f'load_oft_weights(pipe, {str(adapter)!r}, adapter_name="mine")\n'
        f"prompt = {config.fill(config.instance_prompt)!r}\n"
        f"{draw}"
        'set_oft_adapters(pipe, ["mine"], [0.7])  # weaker; 0 is the base\n'
    )
