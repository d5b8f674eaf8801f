"""Where a pipeline's components are while it draws: text encoders that live elsewhere come for the prompts alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from oft_diffusion.quantized import send


def where(module: nn.Module) -> torch.device:
    """The device of a component's first parameter."""
    return next(module.parameters()).device


@contextmanager
def in_turn(
    pipe: Any, device: torch.device, encoders: Sequence[nn.Module], denoisers: Sequence[nn.Module]
) -> Iterator[None]:
    """Each call of the pipeline begins with its text encoders on the device; as it comes to a denoiser, they go home.

    So the device need not hold both them and what comes and goes while pictures are made. Those that live there stay.

    Args:
        pipe: a pipeline of the caller's own, which gets a class of its own.
        device: where it works.
        encoders: its text encoders.
        denoisers: what it calls next.
    """
    homes = {encoder: home for encoder in encoders if (home := where(encoder)) != device}
    if not homes:
        yield
        return

    def come() -> None:
        for encoder in homes:
            send(encoder, device)

    def go() -> None:
        for encoder, home in homes.items():
            if where(encoder) != home:
                send(encoder, home)

    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        come()
        return kind.__call__(self, *args, **kwargs)

    # Pipelines look for the device that they work on at their components, of which the first may be away by then.
    own = {"__call__": call, "_execution_device": property(lambda _: device), "device": property(lambda _: device)}
    pipe.__class__ = type(kind.__name__, (kind,), own)
    with ExitStack() as restored:
        restored.callback(go)
        for denoiser in denoisers:
            restored.callback(denoiser.register_forward_pre_hook(lambda *_: go()).remove)
        yield
