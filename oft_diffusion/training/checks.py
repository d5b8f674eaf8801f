"""What can be wrong with a `TrainConfig` by itself, no file looked at. Everything is found, nothing raised half-way."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import torch

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import ConfigError, OFTError
from oft_diffusion.training.config import TrainConfig, hints
from oft_diffusion.training.config_io import nearest


class Problem(NamedTuple):
    """One thing that is wrong, and the knobs that it makes unusable for further checks."""

    knobs: tuple[str, ...]
    error: OFTError


# knob: what must be on for it to mean anything
_NEEDS = {"text_encoder_learning_rate": "text_encoder", "class_dir": "prior_preservation"}

# (knobs, what must be so for them to mean anything, whether it is so). These have defaults, and a file of settings may
# keep them while a switch is turned off: hence a note, no error. Prompts are templates, and harmless.
_IDLE: tuple[tuple[tuple[str, ...], str, Callable[[TrainConfig], bool]], ...] = (
    (("neumann_order",), "parametrisation = 'cayley_neumann'", lambda c: c.parametrisation == "cayley_neumann"),
    (
        ("prior_weight", "prior_target", "class_batch_size", "num_class_images"),
        "prior_preservation = true",
        lambda c: c.prior_preservation,
    ),
    (("validation_every",), "validation_prompts", lambda c: bool(c.validation_prompts)),
    (("config_dir",), "a single-file model", lambda c: Path(c.model).suffix == ".safetensors"),
    (("layer_offload",), "a CUDA card", lambda _: torch.cuda.is_available()),
)

_EXCLUSIVE = (
    ("text_encoder", "cache_text_embeddings", "cached embeddings would not follow the text encoder as it learns"),
    ("denoiser_file", "quantization", "what the file holds is quantized already"),
    ("resume", "overwrite", "one goes on with the earlier run, the other deletes it"),
)


def settings_problems(config: TrainConfig) -> list[Problem]:
    """Knobs of the wrong type or out of range, then contradictions between those that are fine alone."""
    found = [Problem((f.name,), error) for f in fields(config) if (error := _check_knob(f, getattr(config, f.name)))]
    broken = {knob for problem in found for knob in problem.knobs}
    for check, knobs in _CONTRADICTIONS:
        if not broken & set(knobs):
            found += check(config)
    return found


def idle_notes(config: TrainConfig) -> list[str]:
    """A sentence about each group of knobs that are not at their defaults and do nothing all the same."""
    defaults = {f.name: f.default for f in fields(config)}
    notes = []
    for knobs, condition, met in _IDLE:
        idle = [f"{knob} = {getattr(config, knob)!r}" for knob in knobs if getattr(config, knob) != defaults[knob]]
        if idle and not met(config):
            notes.append(f"without {condition} this does nothing: {', '.join(idle)}")
    return notes


def raise_problems(problems: Sequence[OFTError]) -> None:
    """Raise a lone problem as it is, several as one numbered list; return when there is none.

    Raises:
        OFTError: there are problems.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "".join(f"\n  {i}. {error}" for i, error in enumerate(problems, 1))
        raise ConfigError(
            f"{len(problems)} problems, found before any model was loaded:{listed}\n",
            expected="settings and files without them",
            fix="correct each as it says",
        )


def _adapter_problems(config: TrainConfig) -> Iterator[Problem]:
    try:
        _ = config.oft
    except ConfigError as error:
        yield Problem(tuple(f.name for f in fields(OFTConfig) if error.problem.startswith(f.name)), error)


def _unused_or_exclusive(config: TrainConfig) -> Iterator[Problem]:
    for knob, needs in _NEEDS.items():
        if getattr(config, knob) is not None and not getattr(config, needs):
            problem = ConfigError(
                f"{knob} is set but {needs} is off, so it would do nothing",
                expected=f"{knob} together with {needs} = true",
                fix=f"turn {needs} on, or leave {knob} out",
            )
            yield Problem((knob, needs), problem)
    for first, second, why in _EXCLUSIVE:
        if getattr(config, first) and getattr(config, second):
            problem = ConfigError(
                f"{first} and {second} are both set: {why}", expected="at most one of them", fix=f"drop {second}"
            )
            yield Problem((first, second), problem)


def _dropping_problems(config: TrainConfig) -> Iterator[Problem]:
    missing = [knob for knob in _CACHES if not getattr(config, knob)]
    if config.drop_encoders and missing:
        problem = ConfigError(
            f"drop_encoders = true without {' and '.join(missing)}, but steps would need what was dropped",
            expected=f"{' and '.join(f'{knob} = true' for knob in _CACHES)} beside it",
            fix=f"set {' and '.join(missing)}, or leave drop_encoders out",
        )
        yield Problem(("drop_encoders",), problem)


def _schedule_problems(config: TrainConfig) -> Iterator[Problem]:
    if config.warmup_steps >= config.steps:
        problem = ConfigError(
            f"warmup_steps = {config.warmup_steps} takes up all of steps = {config.steps}",
            expected="a warm-up shorter than the run",
            fix=f"use warmup_steps = {config.steps // 10}, or more steps",
        )
        yield Problem(("warmup_steps",), problem)
    elif config.warmup_steps + config.decay_steps > config.steps:
        problem = ConfigError(
            f"warmup_steps = {config.warmup_steps} and decay_steps = {config.decay_steps} are more than "
            f"steps = {config.steps}",
            expected="no more than steps together",
            fix=f"use decay_steps = {config.steps - config.warmup_steps}, or more steps",
        )
        yield Problem(("decay_steps",), problem)
    if config.decay_steps and config.lr_schedule != "constant":
        problem = ConfigError(
            f"decay_steps = {config.decay_steps} with lr_schedule = {config.lr_schedule!r}, which falls all the way",
            expected='decay_steps with lr_schedule = "constant" alone',
            fix="leave one of them out",
        )
        yield Problem(("decay_steps",), problem)


def _timestep_problems(config: TrainConfig) -> Iterator[Problem]:
    if config.max_timestep is not None and config.min_timestep >= config.max_timestep:
        problem = ConfigError(
            f"min_timestep = {config.min_timestep} is not below max_timestep = {config.max_timestep}",
            expected="a range with timesteps in it",
            fix="correct one of them, or leave both out",
        )
        yield Problem(("min_timestep", "max_timestep"), problem)


def _prompt_problems(config: TrainConfig) -> Iterator[Problem]:
    prompts = {
        "instance_prompt": config.instance_prompt,
    }
    for knob in ("class_prompts", "validation_prompts"):
        prompts |= {f"{knob}[{i}]": prompt for i, prompt in enumerate(getattr(config, knob))}
    words: dict[str, list[str]] = {}
    for place, prompt in prompts.items():
        try:
            words[place] = config.fill(prompt).lower().replace(",", " ").split()
        except ConfigError as error:
            yield Problem((place.partition("[")[0],), error)
    trigger, class_word = config.trigger.lower().split(), config.class_word.lower().split()
    if contains(class_word, trigger):
        problem = ConfigError(
            f"the trigger {config.trigger!r} is part of the class word {config.class_word!r}",
            expected="a rare word that names the subject and nothing else",
            fix="use a word such as sks or ohwx",
        )
        yield Problem(("trigger",), problem)
    elif not contains(words.get("instance_prompt", trigger), trigger):
        problem = ConfigError(
            f"instance_prompt = {config.instance_prompt!r} does not hold the trigger {config.trigger!r}",
            expected="a prompt that names the subject",
            fix='use "a photo of {trigger} {class_word}"',
        )
        yield Problem(("instance_prompt",), problem)
    yield from _class_prompt_problems(config, words)
    if config.prior_twins and not (config.prior_preservation and config.prior_target == "base"):
        problem = ConfigError(
            f"prior_twins = {config.prior_twins} would teach that the pictures do not show the subject",
            expected='prior_preservation = true and prior_target = "base", so that they teach what the base answers',
            fix="set both, or leave prior_twins out",
        )
        yield Problem(("prior_twins",), problem)


def _class_prompt_problems(config: TrainConfig, words: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    if not config.prior_preservation:
        return
    if not config.class_prompts:
        problem = ConfigError(
            "prior_preservation has no class_prompts", expected="one or more", fix='use ["a photo of {class_word}"]'
        )
        yield Problem(("class_prompts",), problem)
    trigger = config.trigger.lower().split()
    for place, said in words.items():
        if place.startswith("class_prompts") and contains(said, trigger):
            problem = ConfigError(
                f"{place} = {' '.join(said)!r} holds the trigger {config.trigger!r}",
                expected="a prompt for the class in general, or for anything else that shall stay as it is",
                fix='use "a photo of {class_word}"',
            )
            yield Problem(("class_prompts",), problem)


def contains(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether `part` occurs in `words` as consecutive whole words."""
    return any(list(words[i : i + len(part)]) == list(part) for i in range(len(words) - len(part) + 1))


_CACHES = ("cache_latents", "cache_text_embeddings")
_PROMPTS = ("instance_prompt", "class_prompts", "validation_prompts")

# (check, the knobs that must be of the right type for it)
_CONTRADICTIONS = (
    (_adapter_problems, tuple(f.name for f in fields(OFTConfig))),
    (_unused_or_exclusive, (*_NEEDS, *_NEEDS.values(), *(knob for row in _EXCLUSIVE for knob in row[:2]))),
    (_dropping_problems, ("drop_encoders", *_CACHES)),
    (_schedule_problems, ("warmup_steps", "decay_steps", "lr_schedule", "steps")),
    (_timestep_problems, ("min_timestep", "max_timestep")),
    (_prompt_problems, ("trigger", "class_word", "prior_preservation", "prior_target", "prior_twins", *_PROMPTS)),
)


def _check_knob(f: Field[Any], value: Any) -> ConfigError | None:
    limits, name = f.metadata, f.name
    hint = hints()[name]
    low, above, high = limits.get("minimum"), limits.get("above"), limits.get("maximum")
    bounds = [f"at least {low}"] if low is not None else []
    bounds += [f"above {above:g}"] if above is not None else []
    bounds += [f"at most {high}"] if high is not None else []
    expected = " ".join([_describe(hint), " and ".join(bounds)]).strip()
    if not _fits(value, hint, blank=limits.get("blank", False)):
        shown = nearest(value, get_args(hint)) if get_origin(hint) is Literal and isinstance(value, str) else value
        shown = shown if isinstance(shown, str) and shown != value else repr(value)
        return ConfigError(f"{name} = {shown} is not usable", expected=expected, fix=f"correct {name}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if (low is not None and value < low) or (above is not None and value <= above) or value > (high or math.inf):
            return ConfigError(f"{name} = {value} is out of range", expected=expected, fix=f"correct {name}")
    elif isinstance(value, str) and not value.strip():
        return ConfigError(f"{name} is empty", expected=limits["about"], fix=f"give {name} a value, or leave it out")
    return None


def _fits(value: Any, hint: Any, *, blank: bool = False) -> bool:
    """Whether a value is of a knob's type; `blank`: whether a list's texts may be empty."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) and (blank or v.strip()) for v in value)
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "nothing"}


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(h) for h in get_args(hint))
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "a list of texts" if origin is tuple else _NAMES[hint]
