"""What the parts of a run take, from a little of each: caching, drawing, steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from oft_diffusion.images import read_picture
from oft_diffusion.training.batches import Batches
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import normalise, square_pixels
from oft_diffusion.training.families import Family
from oft_diffusion.training.memory import Meter, tensor_bytes
from oft_diffusion.training.step import Stepper

_ENCODINGS = 3  # that are timed, after one that warms up
_DENOISING = 4  # steps of the drawing that is timed
_FORWARDS = 2  # of an accumulated step; the others go as the second
STEPS = 6  # one to warm up, one for its memory, the others for their time


class Cost(NamedTuple):
    """Seconds; bytes that stay; and bytes that come and go."""

    seconds: float = 0.0
    held: int = 0
    growth: int = 0


def now(device: torch.device) -> float:
    """Seconds of a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def caching(config: TrainConfig, batches: Batches, meter: Meter) -> Cost:
    """Of encoding all that the batches of a run can show and tell, as far as the config caches it.

    The first instance image is encoded a few times, and each of a few prompts.
    """
    family, found = batches.family, Cost()
    if config.cache_latents:
        path = batches.pictures["instance"][0].path
        views = sum(map(len, batches.views().values()))

        def encode(_: int) -> Any:
            return family.encode_image(normalise(square_pixels(read_picture(path), config.resolution)))

        found = _encoding(encode, views, meter)
    if config.cache_text_embeddings:
        prompts = batches.prompts()
        with torch.no_grad():
            texts = _encoding(
                lambda turn: family.encode_text([prompts[turn % len(prompts)]], config.resolution), len(prompts), meter,
                family.reading,
            )  # fmt: skip
        found = Cost(found.seconds + texts.seconds, found.held + texts.held, max(found.growth, texts.growth))
    return found


def _encoding(
    encode: Callable[[int], Any],
    count: int,
    meter: Meter,
    there: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Cost:
    """Of `count` encodings, from a few; `there` brings what encodes onto the device, whose bytes count as growth."""

    def first() -> None:
        with there():
            encode(0)

    growth = meter.growth(first)
    seconds, held = [], 0
    with there():
        for turn in range(_ENCODINGS):
            started = now(meter.device)
            found = encode(turn)
            seconds.append(now(meter.device) - started)
            held = max(held, tensor_bytes(found))
    return Cost(count * statistics.median(seconds), count * held, growth)


def drawing(
    config: TrainConfig,
    family: Family,
    prompts: Sequence[str],
    count: int,
    meter: Meter,
    on_step: Callable[[], object] = lambda: None,
) -> Cost:
    """Of `count` pictures, drawn as many at once as there are prompts here; nothing where there are none.

    One call of the pipeline with a few denoising steps is timed. What is between its first and last call of a denoiser
    takes the longer, the more steps there are; the rest (prompts, decoding) is as it is. `on_step` is called before
    each call of a denoiser.
    """
    if not count:
        return Cost()
    few = min(_DENOISING, config.sampling_steps)

    def draw() -> None:
        family.sample(prompts, range(len(prompts)), config.resolution, few, config.guidance_scale)

    marks: list[float] = []

    def mark(*_: object) -> None:
        marks.append(now(meter.device))

    denoisers = [family.module(name) for name in family.base.denoisers]
    hooks = [d.register_forward_pre_hook(lambda *_: (on_step(), None)[1]) for d in denoisers]
    try:
        growth = meter.growth(draw)  # and warms up
        hooks += [h for d in denoisers for h in (d.register_forward_pre_hook(mark), d.register_forward_hook(mark))]
        mark()
        draw()
        mark()
    finally:
        for hook in hooks:
            hook.remove()
    began, first, *_, last, ended = marks
    denoising = last - first
    seconds = ended - began - denoising + denoising * config.sampling_steps / few
    return Cost(seconds * count / len(prompts), 0, growth)


def batch_numbers(config: TrainConfig, done: int) -> list[list[int]]:
    """The batches of the steps that `stepping` takes, after `done` of them: those of the run itself."""
    forwards = range(min(config.accumulation, _FORWARDS))
    return [[(done + turn) * config.accumulation + i for i in forwards] for turn in range(STEPS)]


def stepping(
    stepper: Stepper, numbers: Sequence[Sequence[int]], meter: Meter, on_part: Callable[[str], object]
) -> Cost:
    """Of one optimizer step, by the run's own; the median of all but two.

    Args:
        stepper: of freshly prepared parts, which learn here.
        numbers: from `batch_numbers`.
        meter: of the device.
        on_part: told of each step before it is taken.

    Raises:
        TrainingError: what would end the run in these steps.
    """

    def step(turn: int) -> tuple[list[float], float]:
        """Seconds of each forward and backward, and of the descent."""
        on_part(f"step {turn + 1} of {len(numbers)}")
        totals = torch.zeros(3, device=meter.device)
        learned, started = [], now(meter.device)
        for number in numbers[turn]:
            totals += stepper.learn(number, last=number == numbers[turn][-1])
            learned.append(now(meter.device) - started)
            started = now(meter.device)
        stepper.descend(totals, turn + 1)
        return learned, now(meter.device) - started

    step(0)
    growth = meter.growth(lambda: step(1))
    timed = [step(turn) for turn in range(2, len(numbers))]
    learned = statistics.median(seconds for own, _ in timed for seconds in own)
    descended = statistics.median(seconds for _, seconds in timed)
    return Cost(stepper.config.accumulation * learned + descended, 0, growth)
