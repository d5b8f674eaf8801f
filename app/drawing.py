"""Pictures with adapters: what a pipeline can be asked, and drawing it, with previews, until someone cancels."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, ImageOps

from oft_diffusion import load_oft_weights, set_oft_adapters, unload_oft_weights
from oft_diffusion.errors import ConfigError
from oft_diffusion.generate import Picture, Step, generate
from oft_diffusion.pipeline import list_oft_adapters

from .machine import Job
from .previews import Previews
from .shelf import Card

MOST_PICTURES, MOST_STEPS, LARGEST = 16, 150, 2048
MOST_ADAPTERS, STRENGTHS = 3, (-1.0, 2.0)
FORM_GUIDANCE = 20.0  # where the form's slider ends
LONGEST_PROMPT = 4000
_MOST_LOADED = 6  # adapters that stay in the pipeline, in case they are wanted again


@dataclass(frozen=True)
class Abilities:
    """What a pipeline can be asked.

    Attributes:
        model: its name.
        negative: whether it knows negative prompts.
        image: whether it has a twin that begins with a picture.
        size: sides of the pictures that it was trained on.
        multiple: what sides must be multiples of.
        schedulers: that fit it, its own first.
        steps, guidance: to begin with.
    """

    model: str
    negative: bool
    image: bool
    size: int
    multiple: int
    schedulers: tuple[str, ...]
    steps: int
    guidance: float


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        prompt, negative: texts.
        seeds: one per picture.
        steps, guidance, width, height: as for `generate`; no size is the model's own.
        scheduler: by class name; empty for the pipeline's own.
        adapters: (card, strength), in the order in which they act.
        image, change: a picture to begin with, and how much of it may change. Where its shape is another one than that
            of width and height, what is too much is cut off at both sides.
    """

    prompt: str
    seeds: tuple[int, ...]
    negative: str = ""
    steps: int = 25
    guidance: float = 7.5
    width: int | None = None
    height: int | None = None
    scheduler: str = ""
    adapters: tuple[tuple[Card, float], ...] = ()
    image: Image.Image | None = None
    change: float = 0.6


def check(request: Request, abilities: Abilities) -> None:
    """Refuse what no pipeline should be asked, before anyone waits for it.

    Raises:
        ConfigError: with the limit.
    """
    if not request.prompt.strip():
        raise ConfigError("the prompt is empty", expected="what to draw", fix="write it")
    limits: dict[str, tuple[float, float, float]] = {
        "pictures": (len(request.seeds), 1, MOST_PICTURES),
        "steps": (request.steps, 1, MOST_STEPS),
        "letters of the prompt": (len(request.prompt), 0, LONGEST_PROMPT),
        "letters of the negative prompt": (len(request.negative), 0, LONGEST_PROMPT),
        "as guidance": (request.guidance, 0, 100),
        "as share that may change": (request.change, 0.01, 1),
        "adapters": (len(request.adapters), 0, MOST_ADAPTERS),
        **{f"as strength of {card.name}": (strength, *STRENGTHS) for card, strength in request.adapters},
        "pixels of the width": (request.width or abilities.size, abilities.multiple, LARGEST),
        "pixels of the height": (request.height or abilities.size, abilities.multiple, LARGEST),
    }
    for what, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise ConfigError(f"{value:g} {what}", expected=f"{least:g} to {most:g}", fix="change it")
    ids = [card.id for card, _ in request.adapters]
    for card, _ in request.adapters:
        if ids.count(card.id) > 1:
            raise ConfigError(f"{card.name} is there twice", expected="each adapter once", fix="choose another one")
    if request.scheduler and request.scheduler not in abilities.schedulers:
        raise ConfigError(
            f"{request.scheduler!r} is no scheduler for this model",
            expected=", ".join(abilities.schedulers),
            fix="choose one of these",
        )
    if not all(0 <= seed < 2**63 for seed in request.seeds):
        raise ConfigError("a seed out of range", expected="0 to 2^63 - 1", fix="choose another one")


def number(what: str, value: object) -> float:
    """A number of a form.

    Raises:
        ConfigError: the field is empty, or holds something else.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{what} is no number, or empty", expected="a number", fix="fill it in")
    return value


def settings_of(steps: object, guidance: object, scheduler: object, width: object, height: object) -> dict[str, Any]:
    """What a form says of how to draw, as `Request` takes it.

    Raises:
        ConfigError: a field is empty, or holds no number.
    """
    return {
        "steps": int(number("Steps", steps)), "guidance": float(number("Guidance", guidance)),
        "scheduler": str(scheduler or ""),
        "width": int(number("The width", width)), "height": int(number("The height", height)),
    }  # fmt: skip


def size_like(picture: tuple[int, int], own: Abilities) -> tuple[int, int]:
    """Width and height in the shape of a picture, of about as many pixels as the model draws by itself."""
    shape = math.sqrt(picture[0] / picture[1])
    width, height = (
        min(LARGEST // own.multiple, max(1, round(side / own.multiple))) * own.multiple
        for side in (own.size * shape, own.size / shape)
    )
    return width, height


class Studio:
    """A pipeline, and the adapters that are in it. Not for two threads at once: the machine's turn sees to that."""

    def __init__(self, pipe: Any, model: str, steps: int, guidance: float) -> None:
        self.pipe = pipe
        self.original, self.device = pipe.scheduler, pipe.device
        self._recent: list[str] = []  # names in the pipeline, the one used longest ago first
        self._deleted: set[str] = set()  # names that may still be in it
        self.abilities = _abilities(pipe, model, steps, guidance)

    def draw(self, request: Request, job: Job, keep: Callable[[Picture], Any]) -> None:
        """Draw, telling the job of each step and, through `keep`, of each picture.

        Raises:
            Cancelled: the job was cancelled; within a step.
            OFTError: an adapter does not fit, or the pipeline refuses a setting.
        """
        job.tell(text="preparing")
        if self.pipe.device != self.device:
            self.pipe.to(self.device)
        self.arrange(request.adapters)
        job.check()
        image, (width, height) = self._begun(request)
        own, started = self.abilities.size, time.monotonic()
        previews = Previews(self.pipe, (width or own, height or own))

        def after(step: Step) -> None:
            job.check()
            in_batch = min(4, step.pictures - step.first)
            share = (step.first + in_batch * step.step / step.steps) / step.pictures
            elapsed = time.monotonic() - started
            job.tell(
                text=f"step {step.step} of {step.steps}", done=round(100 * share), total=100,
                seconds_left=elapsed / share - elapsed, preview=previews.of(step) or job.progress.preview,
            )  # fmt: skip

        self._schedule(request.scheduler)
        try:
            generate(
                self.pipe, request.prompt, request.seeds, negative_prompt=request.negative or None,
                steps=request.steps, guidance=request.guidance, width=width, height=height, image=image,
                change=request.change, on_step=after,
                on_picture=lambda picture, _: job.tell(keep(_named(picture, request.adapters))),
            )  # fmt: skip
        finally:
            self._schedule("")

    def arrange(self, adapters: Sequence[tuple[Card, float]]) -> None:
        """Have these adapters act, in this order. Those that were loaded before need no reading.

        Raises:
            OFTError: one was deleted while this waited for its turn, or does not fit.
        """
        self._drop_deleted()
        for card, _ in adapters:
            if not card.file.is_file():
                raise ConfigError(
                    f"the adapter {card.name} was deleted meanwhile", expected="one on the shelf",
                    fix="choose another one",
                )  # fmt: skip
        loaded = {adapter.name for adapter in list_oft_adapters(self.pipe)}
        for card, _ in adapters:
            name = _name(card)
            if name not in loaded:
                load_oft_weights(self.pipe, card.file, adapter_name=name)
            self._recent = [*(n for n in self._recent if n != name), name]
        if self._recent:
            set_oft_adapters(self.pipe, [_name(card) for card, _ in adapters], [strength for _, strength in adapters])
        while len(self._recent) > max(_MOST_LOADED, len(adapters)):
            unload_oft_weights(self.pipe, self._recent.pop(0))

    def rest(self) -> None:
        """Leave the device's memory to others until the next drawing."""
        if self.pipe.device.type != "cpu":
            self.pipe.to("cpu")
            torch.cuda.empty_cache()

    def forget(self, adapter_id: str) -> None:
        """Let go of an adapter that was deleted: at the next drawing, since one may go on now."""
        self._deleted.add(f"a{adapter_id}")

    def _drop_deleted(self) -> None:
        while self._deleted:
            if (name := self._deleted.pop()) in self._recent:
                self._recent.remove(name)
                unload_oft_weights(self.pipe, name)

    def _begun(self, request: Request) -> tuple[Image.Image | None, tuple[int | None, int | None]]:
        """The picture to begin with, cut to the size that is asked for, and that size."""
        if request.image is None:
            return None, (request.width, request.height)
        asked = request.width and request.height and (request.width, request.height)
        size = asked or size_like(request.image.size, self.abilities)
        return ImageOps.fit(request.image.convert("RGB"), size, Image.Resampling.LANCZOS), size

    def _schedule(self, name: str) -> None:
        self.pipe.scheduler = getattr(diffusers, name).from_config(self.original.config) if name else self.original


def _abilities(pipe: Any, model: str, steps: int, guidance: float) -> Abilities:
    from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image

    known = inspect.signature(type(pipe).__call__).parameters
    embedded = "true_cfg_scale" in known and getattr(known.get("guidance_scale"), "default", None) is not None
    try:
        twin = AutoPipelineForImage2Image.from_pipe(pipe) is not None
    except (ValueError, TypeError):
        twin = False
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    own = type(pipe.scheduler).__name__
    others = sorted({c.__name__ for c in pipe.scheduler.compatibles} - {own})
    usable = [name for name in others if hasattr(diffusers, name) and _can_be(pipe, name)]
    return Abilities(
        model=model,
        negative="negative_prompt" in known and not embedded,
        image=twin,
        size=int(getattr(pipe, "default_sample_size", None) or _sample_size(pipe)) * factor,
        multiple=factor,
        schedulers=(own, *usable),
        steps=steps,
        guidance=guidance,
    )


def _sample_size(pipe: Any) -> int:
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(getattr(denoiser, "config", None), "sample_size", None) or 64
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _can_be(pipe: Any, name: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(diffusers, name).from_config(pipe.scheduler.config)
    except Exception:  # noqa: BLE001 - some want packages that are not there, each in its own way
        return False
    return True


def _name(card: Card) -> str:
    return f"a{card.id}"


def _named(picture: Picture, adapters: Sequence[tuple[Card, float]]) -> Picture:
    """With the adapters' own names in its settings."""
    names = {_name(card): card.name for card, _ in adapters}
    told = [{**a, "name": names.get(a["name"], a["name"])} for a in picture.settings["adapters"]]
    return replace(picture, settings={**picture.settings, "adapters": told})


def seeds_from(first: int, count: int) -> tuple[int, ...]:
    """As many seeds, one after another.

    Raises:
        ConfigError: they are too many for one drawing.
    """
    if not 1 <= count <= MOST_PICTURES:
        raise ConfigError(f"{count:g} pictures", expected=f"1 to {MOST_PICTURES}", fix="change it")
    return tuple(range(first, first + count))


def newest_first(folder: Path) -> list[Path]:
    """Pictures in a folder; their names sort by time."""
    return sorted(folder.glob("*.png"), reverse=True)
