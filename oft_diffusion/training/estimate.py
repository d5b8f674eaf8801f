"""How long a run will take and how much memory, before it starts: `estimate(config)`.

Counted: parameters of base and adapter and their bytes, gradients, Adam's moments, the adapter file, caches, and how
many steps, encodings and pictures there will be. Measured, with the run's own model, settings and device: loading, a
few encodings, a few optimizer steps (the first warms up, the second is looked at for its memory, the median of the
others counts) and a drawing of a few denoising steps. Assumed: that the rest goes as what was measured, that checks and
files take no time, and that nothing else comes to use the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import torch
from accelerate import Accelerator

from oft_diffusion.streaming import streamed_bytes
from oft_diffusion.training.batches import Batches
from oft_diffusion.training.checkpoint import read_state
from oft_diffusion.training.class_images import ClassImages
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.count import Counts, count
from oft_diffusion.training.data import Picture
from oft_diffusion.training.families import AT_ONCE, Family, where
from oft_diffusion.training.loop import draws_after
from oft_diffusion.training.memory import Meter
from oft_diffusion.training.page import pictures_on_page
from oft_diffusion.training.preflight import Plan, preflight
from oft_diffusion.training.prepare import Parts, accelerated, assemble, load_family, pictures_of, streams
from oft_diffusion.training.savings import Phase, savings, size, too_large
from oft_diffusion.training.state import resume
from oft_diffusion.training.step import Stepper
from oft_diffusion.training.timing import batch_numbers, caching, drawing, now, stepping


@dataclass(frozen=True)
class Times:
    """Seconds of a run's parts. `steps` is that of training alone, what `TrainResult.seconds` will say."""

    loading: float
    class_images: float
    caching: float
    steps: float
    pictures: float


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, at their most; of one process, where several train.

    Attributes:
        base: the base's weights; counted.
        parked: of these, what is moved off a GPU, streamed to it or dropped during steps; counted.
        adapter: its generators; counted.
        training: their gradients and Adam's moments; counted.
        caches: latents and embeddings, where they lie on the device; counted.
        activations: what else comes and goes within a step, the adapter's deltas included; measured.
        pictures: what comes and goes while pictures and prompts are encoded or a few pictures are drawn, with what was
            parked of the base, as far as it is there at once; measured.
        process: by how much this process really grew meanwhile, on a processor under Linux, with the allocator's gaps
            and libraries' buffers; 0 where that cannot be told.
        arriving: what is on the device before its weights are streamed; counted.
    """

    base: int
    parked: int
    adapter: int
    training: int
    caches: int
    activations: int
    pictures: int
    process: int
    arriving: int = 0

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.while_training, self._pictures, self.process, self.arriving)

    @property
    def beside(self) -> int:
        """What the process grew beyond all that was counted and measured."""
        return self.peak - max(self.while_training, self._pictures, self.arriving)

    @property
    def peak_is_loading(self) -> bool:
        """Whether most is there before its weights are streamed."""
        return self.arriving > max(self.while_training, self._pictures)

    @property
    def peak_is_pictures(self) -> bool:
        """Whether encoding or drawing takes more than a step."""
        return self._pictures > self.while_training

    @property
    def while_training(self) -> int:
        """The most in a step."""
        return self._kept + self.activations

    @property
    def _pictures(self) -> int:
        return self._kept + self.pictures

    @property
    def _kept(self) -> int:
        return self.base - self.parked + self.adapter + self.training + self.caches


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        device: where it was measured, in words.
        steps: optimizer steps that are still to be done.
        seconds_per_step: of one of them; measured.
        times: seconds of the run's parts; those measured, times how often.
        memory: bytes on the device.
        free: bytes that were free there before the base was loaded, None where the system does not tell.
        trained: parameters of the adapter; counted.
        total: parameters of the base; counted.
        file_bytes: of the adapter file's tensors, whose header adds a few hundred bytes per layer; counted.
        class_images, pictures: how many of them are to be drawn; the latter for grids and for the report.
        savings: settings that would take less memory, as sentences have them.
        notes: what the run would note before its first steps.
    """

    device: str
    steps: int
    seconds_per_step: float
    times: Times
    memory: Memory
    free: int | None
    trained: int
    total: int
    file_bytes: int
    class_images: int
    pictures: int
    savings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(getattr(self.times, f.name) for f in fields(self.times))

    @property
    def fits(self) -> bool | None:
        """Whether there was enough free memory, None where the system does not tell."""
        return None if self.free is None else self.memory.peak <= self.free

    def summary(self) -> str:
        """A few lines in plain words."""
        times, memory = self.times, self.memory
        took = {
            "loading": times.loading,
            _several(self.class_images, "class image"): times.class_images,
            "caching": times.caching,
            _several(self.steps, "step"): times.steps,
            _several(self.pictures, "picture"): times.pictures,
        }
        held = {
            "base": memory.base,
            "adapter": memory.adapter,
            "gradients and optimizer": memory.training,
            "activations": memory.activations,
            "caches": memory.caches,
            "encoding and drawing": memory.pictures,
            "all at once while loading": memory.arriving if memory.peak_is_loading else 0,
            "the allocator's gaps and libraries": memory.beside,
        }
        free = "" if self.free is None else f", and {size(self.free)} were free"
        lines = [
            f"time     about {_duration(self.seconds)}, {_duration(self.seconds_per_step)} per step, on {self.device}",
            "         " + ", ".join(f"{what} {_duration(value)}" for what, value in took.items() if value),
            f"memory   at most about {size(memory.peak)}{free}",
            "         " + ", ".join(f"{what} {size(value)}" for what, value in held.items() if value),
            f"adapter  {size(self.file_bytes)} and a header: {self.trained:,} parameters, the base has {self.total:,}",
        ]
        if self.fits is False:
            lines.append(
                f"This does not fit: the run needs about {size(memory.peak)}, and {size(self.free or 0)} were free. "
                f"What would help: {'; '.join(self.savings)}."
            )
        return "\n".join(lines)


def _silent(_: str) -> None: ...


def estimate(config: TrainConfig, on_part: Callable[[str], object] = _silent) -> Estimate:
    """Say what a run would take, from counted parameters and a timed step (see above).

    The base is loaded, cached for a few batches, adapted and trained for a few steps as by `train`, and thrown away: no
    file is written (a hub model is downloaded), and random states are as before. Class images that are missing are not
    made: a call of the pipeline is timed for them, as for the pictures of grids, and in the timed steps instance images
    stand for them. May be called from any thread, while none trains or draws.

    Args:
        config: the run's.
        on_part: told, before each part and within long ones, what is measured; what it raises ends the estimate there.

    Raises:
        OFTError: what would stop the run, as it would; or the memory does not suffice even for finding out.
    """
    plan = preflight(config)
    counts = count(config, plan.base)
    with accelerated(config, plan.base) as accelerator:
        meter = Meter(accelerator.device)
        least = counts.base_bytes + counts.adapter_bytes + counts.training_bytes
        if config.drop_encoders and meter.device.type != "cpu":
            least -= sum(counts.parts[name] for name in plan.base.text_encoders)
        if streams(config, meter.device):
            least = max(least - counts.streamed, counts.arriving)
        if meter.free is not None and least > meter.free:
            raise too_large(f"{size(least)} without activations", meter.free, savings(config, "loading", meter.device))
        try:
            return _measure(config, plan, counts, accelerator, meter, on_part)
        except torch.OutOfMemoryError as error:
            fixes = savings(config, "steps", meter.device)
            raise too_large("more, as a few steps showed", meter.free or 0, fixes) from error


def _measure(
    config: TrainConfig,
    plan: Plan,
    counts: Counts,
    accelerator: Accelerator,
    meter: Meter,
    on_part: Callable[[str], object],
) -> Estimate:
    device, images, notes = accelerator.device, plan.class_images, list(plan.notes)
    done = int(read_state(plan.resume_from)["step"]) if plan.resume_from is not None else 0
    on_part("loading the base")
    started = now(device)
    family = load_family(config, plan.base, device)
    loading = now(device) - started

    def there() -> int:
        """Bytes of the base that are on the device now."""
        found = {name: family.module(name) for name in counts.parts}
        here = {name: module for name, module in found.items() if where(module).type == device.type}
        return sum(counts.parts[name] - streamed_bytes(module) for name, module in here.items())

    at_first = there()
    pictures = pictures_of(config, plan)
    on_part("encoding pictures and prompts")
    caches = caching(config, Batches(config, family, pictures, device), meter)
    missing = [images.prompts[i] for i in images.missing] if images is not None else []
    classes = drawing(
        config, family, missing[:AT_ONCE], len(missing), meter, lambda: on_part("drawing class images")
    )  # fmt: skip
    numbers = batch_numbers(config, done)
    parts = _assemble(config, plan, family, pictures, accelerator, list(chain(*numbers)))
    if plan.resume_from is not None and not missing:  # instance images stand for those, and are not the checkpoint's
        resume(parts, accelerator, plan.resume_from)
    step = stepping(Stepper(config, parts, accelerator, notes.append), numbers, meter, on_part)
    drawn = _pictures_after(done, config)
    kept = there()
    with family.whole():
        at_last = there()
        shown = drawing(
            config, family, _prompts_at_once(config), drawn, meter, lambda: on_part("drawing pictures")
        )  # fmt: skip
    early, late = at_first + max(caches.growth, classes.growth), at_last + shown.growth
    memory = Memory(
        base=counts.base_bytes,
        parked=counts.base_bytes - kept,
        adapter=counts.adapter_bytes,
        training=counts.training_bytes,
        caches=caches.held if device.type == "cpu" else 0,  # a GPU's lie in the processor's memory
        activations=max(step.growth - counts.gradient_bytes, 0),
        pictures=max(early, late) - kept,
        process=meter.process_growth(),
        arriving=counts.arriving if streams(config, device) else 0,
    )
    most: Phase = "grids" if shown.growth and not missing else "encoding"
    if memory.peak_is_loading or not memory.peak_is_pictures:
        most = "loading" if memory.peak_is_loading else "steps"
    return Estimate(
        device=_name(device),
        steps=config.steps - done,
        seconds_per_step=step.seconds,
        times=Times(
            loading=loading,
            class_images=classes.seconds / accelerator.num_processes,
            caching=caches.seconds,
            steps=step.seconds * (config.steps - done),
            pictures=shown.seconds,
        ),
        memory=memory,
        free=meter.free,
        trained=counts.trained,
        total=counts.base,
        file_bytes=counts.file_bytes,
        class_images=len(missing),
        pictures=drawn,
        savings=savings(config, most, device),
        notes=tuple(notes),
    )


def _assemble(
    config: TrainConfig,
    plan: Plan,
    family: Family,
    pictures: Mapping[str, Sequence[Picture]],
    accelerator: Accelerator,
    numbers: Sequence[int],
) -> Parts:
    """The run's parts, with what batches of these numbers need in the caches."""

    def fill(batches: Batches) -> None:
        for number in numbers:
            batches.at(number, accelerator.process_index, accelerator.num_processes)

    at_hand = {**pictures, "class": _at_hand(pictures, plan.class_images)}
    return assemble(config, plan, family, at_hand, accelerator, fill)


def _at_hand(pictures: Mapping[str, Sequence[Picture]], images: ClassImages | None) -> list[Picture]:
    """The class images with their prompts, instance images in the place of those that are missing."""
    missing = {images.paths[i] for i in images.missing} if images is not None else set()
    instances = pictures["instance"]
    return [
        Picture(instances[i % len(instances)].path, picture.prompt) if picture.path in missing else picture
        for i, picture in enumerate(pictures["class"])
    ]


def _pictures_after(done: int, config: TrainConfig) -> int:
    """How many pictures a run draws that has done so many steps: grids, and the report's."""
    grids = sum(draws_after(step, config) for step in range(done + bool(done), config.steps + 1))
    return grids * len(config.validation_prompts) * config.validation_count + pictures_on_page(config)


def _prompts_at_once(config: TrainConfig) -> list[str]:
    """Prompts of one call of the pipeline, as grids have them."""
    prompt = next(iter(config.validation_prompts), config.instance_prompt)
    count = config.validation_count if config.validation_prompts else AT_ONCE  # the report's strengths are no more
    return [config.fill(prompt)] * min(count, AT_ONCE)


# -- words -------------------------------------------------------------------------------------------------------------


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the processor with {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
