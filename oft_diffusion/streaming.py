"""Weights that wait in the processor's memory, and come to a card for the moment in which their layer needs them.

A frozen layer is asked for its weight twice, in the forward and in the backward (`frozen.py`), and nothing else reads
it. So a card that the base does not fit trains on it all the same, layer by layer; other trainers call that block swap
or layer offloading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from oft_diffusion.frozen import FrozenForward
from oft_diffusion.quantized import EightBit, LayerWeight, quantized_weight

_Turn = tuple["StreamedForward", Literal["forward", "recomputed", "backward"]]


def stream_weights(model: nn.Module, share: float, device: torch.device) -> None:
    """Move a frozen component to a device, but for the weights of some layers, which come layer by layer from now on.

    Args:
        model: a component in memory, quantized or not, or on the device already. Not to be moved afterwards.
        share: of the layers in its blocks, by the numbers in their weights, above 0 to 1. Spread evenly, so that one
            weight is on its way while other layers work.
        device: of the forwards.
    """
    chosen = set(streamed_layers(model, share))
    stream = WeightStream(device)
    for module in model.modules():
        module._apply(lambda tensor: tensor.to(device), recurse=False)  # one after another: all would not fit
        weight = quantized_weight(module)
        if isinstance(weight, EightBit):
            weight.follow()
        if module in chosen:
            module.forward = StreamedForward(weight or PlainWeight(module), stream)  # type: ignore[assignment]


def streamed_layers(model: nn.Module, share: float) -> Iterator[nn.Linear]:
    """Which layers' weights are streamed: of the linear ones in lists of blocks, as many as come to the share."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    owed = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith(blocks):
            numbers = layer.in_features * layer.out_features
            owed += share * numbers
            if owed >= numbers:
                owed -= numbers
                yield layer


def streamed_bytes(model: nn.Module) -> int:
    """Of a component's weights that wait in the processor's memory."""
    return sum(found.home.nbytes for layer in model.modules() if isinstance(found := _own(layer), StreamedForward))


def _own(layer: nn.Module) -> Any:
    return layer.__dict__.get("forward")


class PlainWeight(LayerWeight):
    """A layer's weight as it is, quantized by nobody."""

    def values(self, dtype: torch.dtype) -> Tensor:
        found: Tensor = self.weight.data
        return found.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.weight.data}


class StreamedForward(FrozenForward):
    """In the place of a layer's forward: the same answer, while the weight is on the device.

    Attributes:
        home: the weight's bytes in the processor's memory, where the layer has them between its calls.
    """

    def __init__(self, weight: LayerWeight, stream: WeightStream) -> None:
        super().__init__(weight)
        self.stream = stream
        self.home = weight.bulk().to("cpu", copy=True)
        if stream.device.type == "cuda":
            self.home = self.home.pin_memory()  # or copies would wait for each other
        weight.exchange(self.home)

    def as_it_is(self, x: Tensor) -> Tensor:
        """What the library makes of `x`, `(..., in)` to `(..., out)`."""
        with self._there(backward=False):
            return super().as_it_is(x)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight on the device, `(out, in)`."""
        with self._there(backward=True):
            return super().values(dtype)

    @contextmanager
    def _there(self, *, backward: bool) -> Iterator[None]:
        self.weight.exchange(self.stream.take(self, backward=backward))
        try:
            yield
        finally:
            self.weight.exchange(self.home)


class _Coming(NamedTuple):
    """A weight's bytes on their way to the device, and what tells that they are there."""

    owner: StreamedForward
    data: Tensor
    arrived: torch.cuda.Event | None


class WeightStream:
    """Brings a component's weights to a device, the next one while a layer works: two are there at once, no more.

    Which is next is what was next the last time; told apart are forwards, those that a checkpoint's backward does once
    more, and backwards.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: dict[_Turn, StreamedForward] = {}
        self._last: _Turn | None = None
        self._coming: _Coming | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightStream:
        """A stream of the copy's own, which has to learn what comes next."""
        return WeightStream(self.device)

    def take(self, owner: StreamedForward, *, backward: bool) -> Tensor:
        """The weight's bytes on the device, for work that is asked for before the next call."""
        again = torch._C._current_graph_task_id() != -1  # within a backward
        turn: _Turn = (owner, "backward" if backward else "recomputed" if again else "forward")
        if self._last is not None:
            self._next[self._last] = owner
        self._last = turn
        found, self._coming = self._coming, None
        if found is None or found.owner is not owner:
            found = self._send_for(owner)
        if found.arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(found.arrived)
            found.data.record_stream(stream)  # its memory is another's no sooner than the work there is done
        following = self._next.get(turn)
        if following is not None:
            self._coming = found if following is owner else self._send_for(following)
        return found.data

    def _send_for(self, owner: StreamedForward) -> _Coming:
        if self._side is None:
            return _Coming(owner, owner.home.to(self.device, copy=True), None)
        with torch.cuda.stream(self._side):
            data = owner.home.to(self.device, non_blocking=True, copy=True)
            return _Coming(owner, data, self._side.record_event())
