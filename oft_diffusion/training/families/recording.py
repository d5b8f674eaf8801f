"""What a pipeline gives its denoiser beside latents and timestep, recorded from the pipeline's own call.

Encoders, chat templates, pooled embeddings, masks, position and time ids, guidance embeddings: every pipeline knows its
own, and inference uses them exactly so. Hence they are not written again here. The pipeline's `__call__` runs up to its
first call of the denoiser, without the `no_grad` that decorates it, so that adapters in text encoders learn through it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Conditioning = dict[str, Any]  # the denoiser's arguments by name: tensors, lists, dictionaries, numbers, None


class _Reached(Exception):  # noqa: N818 - no error, but a way out of the pipeline's loop
    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.args_given, self.kwargs_given = args, kwargs


def recorder(pipeline: Any, denoiser: nn.Module) -> Any:
    """The pipeline for `record_call`: the same components, but told that it works where the denoiser is.

    Pipelines look through all modules for that, in every call, which takes longer than a small text encoder.
    """
    kind = type(pipeline)
    found = copy.copy(pipeline)
    where = property(lambda _: next(denoiser.parameters()).device)
    found.__class__ = type(kind.__name__, (kind,), {"_execution_device": where})
    return found


def record_call(pipeline: Any, denoiser: nn.Module, **call: Any) -> Conditioning:
    """The arguments by name of the first call that a `recorder` makes of its denoiser, which is not run.

    Differentiable wherever the pipeline's text encoders are.
    """

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    handle = denoiser.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        inspect.unwrap(type(pipeline).__call__)(pipeline, **call)
    except _Reached as reached:
        bound = inspect.signature(denoiser.forward).bind(*reached.args_given, **reached.kwargs_given)
        further = bound.arguments.pop("kwargs", {})
        return {**bound.arguments, **further}
    finally:
        handle.remove()
    raise AssertionError(f"{type(pipeline).__name__} did not call its {type(denoiser).__name__}")


def inputs(denoiser: nn.Module) -> tuple[str, str]:
    """What a denoiser calls its latents (its first parameter) and its timestep.

    Raises:
        LookupError: it has no timestep.
    """
    names = list(inspect.signature(denoiser.forward).parameters)
    return names[0], next(name for name in ("timestep", "timesteps", "t") if name in names)


class Stacking:
    """Joins recordings of single prompts to that of a batch.

    Which axis of which argument counts the prompts is learned from two recordings, of one prompt and of that prompt
    twice: the axis that became twice as long. Arguments without such an axis are the same for all prompts.
    """

    def __init__(self, once: Conditioning, twice: Conditioning) -> None:
        self._axes = {name: _axis(value, twice[name]) for name, value in once.items()}

    def join(self, recordings: Sequence[Conditioning]) -> Conditioning:
        """One conditioning for several prompts, whose recordings must be of equal `shape`."""
        return {name: _join([r[name] for r in recordings], axis) for name, axis in self._axes.items()}

    def shape(self, recording: Conditioning) -> tuple[Any, ...]:
        """What must be equal for recordings to be joined: lengths of prompts differ in some families."""
        return tuple(_shape(value) for value in recording.values())


_SAME = None  # as an axis: not per prompt


def _axis(once: Any, twice: Any) -> Any:
    """The axis that counts prompts, per leaf; a list or dictionary of leaves has a list or dictionary of axes."""
    if isinstance(once, Tensor):
        sizes = enumerate(zip(once.shape, twice.shape, strict=True))
        longer = [i for i, (one, two) in sizes if 0 < one == two / 2]
        return longer[0] if longer else _SAME
    if isinstance(once, (list, tuple)):
        if len(twice) == 2 * len(once):
            return 0
        return [_axis(one, two) for one, two in zip(once, twice, strict=True)]
    if isinstance(once, Mapping):
        return {name: _axis(value, twice[name]) for name, value in once.items()}
    return _SAME


def _join(values: Sequence[Any], axis: Any) -> Any:
    first = values[0]
    if axis is _SAME:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(values), dim=axis)
    if isinstance(first, Mapping):
        return {name: _join([value[name] for value in values], axis[name]) for name in first}
    if axis == 0:
        return [entry for value in values for entry in value]
    return [_join(entries, own) for entries, own in zip(zip(*values, strict=True), axis, strict=True)]


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple(_shape(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return tuple(_shape(entry) for entry in value)
    return value is None


def move(value: Any, device: torch.device | str) -> Any:
    """The same conditioning on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: move(entry, device) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [move(entry, device) for entry in value]
    return value
