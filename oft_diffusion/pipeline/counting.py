"""How many prompts and images a pipeline's call is about: a mixed batch's rows alone cannot tell copies from images."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError

# Arguments that have one entry per prompt, or per what stands for one; the first that is given counts.
_PROMPTS = ("prompt", "prompt_embeds", "image_embeds", "class_labels", "image", "batch_size")
_EACH = re.compile(r"num_[a-z]+_per_prompt")


@contextmanager
def announcing_calls(pipe: DiffusionPipeline, count: int, banks: Iterable[OFTBank]) -> Iterator[None]:
    """Have each call of this pipeline tell the banks its prompts, and refuse those that make another number of images.

    Python looks `__call__` up in the class, so the pipeline has one of its own meanwhile, which is else the same.
    """
    kind: Any = type(pipe)
    found = list(banks)
    if not any("__call__" in vars(base) for base in kind.__mro__):  # its parts are called by hand: the banks refuse
        yield
        return
    original = kind.__call__

    @wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not pipe:  # a copy
            return original(self, *args, **kwargs)
        prompts = _counted(original, kind.__name__, count, (self, *args), kwargs)
        for bank in found:
            bank.announce(prompts)
        try:
            return original(self, *args, **kwargs)
        finally:
            for bank in found:
                bank.announce(None)

    inside = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    pipe.__class__ = type(kind.__name__, (kind,), inside)
    try:
        yield
    finally:
        pipe.__class__ = kind


def _counted(call: Any, pipeline: str, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The prompts of a call.

    Raises:
        AdapterError: it does not make `count` images, or nothing tells.
    """
    signature = inspect.signature(call)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # the pipeline says it better
        return count
    bound.apply_defaults()
    prompts, images = count_images(bound.arguments)
    if prompts is None or images is None:
        raise AdapterError(
            f"nothing in this call of {pipeline} tells how many images it makes, while {count} have adapters of their "
            "own",
            expected="prompts, or their embeddings",
            fix="give them, or draw with one adapter at a time",
        )
    if images != count:
        raise AdapterError(
            f"this call makes {images} images while {count} have adapters of their own",
            expected="one name per image, prompts x images per prompt",
            fix="give as many adapter names as the pipeline call makes images",
        )
    return prompts


def count_images(arguments: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The prompts and the images of a call, by all its arguments; None where they do not tell."""
    names = [name for name in _PROMPTS if name != "image" or "prompt" not in arguments]
    prompts = next((_entries(arguments[name]) for name in names if arguments.get(name) is not None), None)
    if prompts is None:
        return None, None
    each = next((value for name, value in arguments.items() if _EACH.fullmatch(name)), 1)
    given = arguments.get("image_embeddings")  # a prior's, which may have made several per prompt
    return prompts, (prompts if given is None else _entries(given) or 0) * (1 if each is None else each)


def _entries(value: Any) -> int | None:
    if isinstance(value, int):
        return value
    if isinstance(value, (list, tuple)):
        nested = bool(value) and isinstance(value[0], (list, tuple))  # several pictures for one image
        return None if nested else len(value)
    return len(value) if isinstance(value, Tensor) or hasattr(value, "shape") else 1
