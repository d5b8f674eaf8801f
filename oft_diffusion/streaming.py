"""Weights that wait in the processor's memory, and come to a card for the moment in which their layer needs them.

A frozen layer is asked for its weight twice, in the forward and in the backward (`frozen.py`), and nothing else reads
it. So a card that the base does not fit trains on it all the same, layer by layer; other trainers call that block swap
or layer offloading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oft_diffusion.errors import TargetError
from oft_diffusion.frozen import FrozenForward
from oft_diffusion.quantized import EightBit, LayerWeight, quantized_weight

_Turn = tuple["StreamedForward", Literal["forward", "recomputed", "backward"]]


def stream_weights(model: nn.Module, share: float, device: torch.device) -> None:
    """Move a frozen component to a device, but for the weights of some layers, which come layer by layer from now on.

    Args:
        model: a component in memory, quantized or not, or on the device already. Not to be moved afterwards.
        share: of the layers in its blocks, by the numbers in their weights, above 0 to 1. Spread evenly, so that one
            weight is on its way while other layers work.
        device: of the forwards. For a card, weights wait in memory that the system can neither swap out nor move.
    """
    chosen = set(streamed_layers(model, share))
    stream, homes = WeightStream(device), Homes(device)
    for module in model.modules():
        weight = quantized_weight(module)
        if module in chosen and weight is None:
            module.forward = StreamedForward(PlainWeight(module), stream, homes)  # type: ignore[assignment]
            if module.bias is not None:
                module.bias.data = module.bias.data.to(device)
            continue
        module._apply(lambda tensor: tensor.to(device), recurse=False)  # one after another: all would not fit
        if isinstance(weight, EightBit):
            weight.follow()
        if module in chosen and weight is not None:
            module.forward = StreamedForward(weight, stream, homes)  # type: ignore[assignment]


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
    """By how much less of a component is on the device: what waits, but for two places there."""
    own = (layer.__dict__.get("forward") for layer in model.modules())
    return spared([forward.home.nbytes for forward in own if isinstance(forward, StreamedForward)])


def spared(sizes: Sequence[int]) -> int:
    """What of streamed weights of these sizes is not on the device: all, but for two places of the largest."""
    return max(0, sum(sizes) - 2 * max(sizes, default=0))


class PlainWeight(LayerWeight):
    """A layer's weight as it is, quantized by nobody."""

    def values(self, dtype: torch.dtype) -> Tensor:
        found: Tensor = self.weight.data
        return found.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.weight.data}


class Homes:
    """Where weights wait: a few large pieces of the processor's memory, which a card reads without waiting for it.

    torch rounds each piece of such memory up to a power of two, so that a piece for each weight would waste a third.
    """

    PIECE = 2**30  # bytes

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._piece = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same numbers, lying as they did."""
        size = _aligned(tensor.nbytes)
        if size > self._piece.numel():
            self._piece = self._new(max(size, self.PIECE) if self._pinned else size)
        mine, self._piece = self._piece[:size], self._piece[size:]
        return _as(mine, tensor).copy_(tensor)

    def _new(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError:  # the system gives no more of that kind: other memory does, and copies take longer
            return torch.empty(size, dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // 512) * 512


def _as(memory: Tensor, tensor: Tensor) -> Tensor:
    """Bytes as a tensor of another's dtype, shape and strides."""
    return memory[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class StreamedForward(FrozenForward):
    """In the place of a layer's forward: the same answer, while the weight is on the device.

    Attributes:
        home: the weight's bytes in the processor's memory, where the layer has them between its calls.
    """

    def __init__(self, weight: LayerWeight, stream: WeightStream, homes: Homes) -> None:
        super().__init__(weight)
        self.stream = stream
        self.home = homes.copy(weight.bulk())
        stream.most = max(stream.most, self.home.nbytes)
        weight.exchange(self.home)

    def wants_the_librarys_graph(self) -> bool:
        """Never: it would keep a place on the device, which the next weight is written to.

        Raises:
            TargetError: the layer's bias is trained, whose gradient that would find.
        """
        bias = self.weight.layer.bias
        if bias is not None and bias.requires_grad:
            raise TargetError(
                "a layer whose weight is streamed has a bias that is trained",
                expected="a frozen base",
                fix="freeze it (requires_grad_(False)), or leave layer_offload out",
            )
        return False

    def as_it_is(self, x: Tensor) -> Tensor:
        """What the library makes of `x`, `(..., in)` to `(..., out)`."""
        with self._there(backward=False):
            return super().as_it_is(x)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight on the device, `(out, in)`, for work that is asked for before the next call of any layer."""
        with self._there(backward=True):
            return super().values(dtype)

    @contextmanager
    def _there(self, *, backward: bool) -> Iterator[None]:
        self.weight.exchange(self.stream.take(self, backward=backward))
        try:
            yield
        finally:
            self.weight.exchange(self.home)


class _Place:
    """Memory on the device for one weight at a time.

    Attributes:
        owner: whose weight is there, or on its way.
        data: it.
        arrived: when it is there; None where copies are waited for.
        free: when the work with the one before is done.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.owner: StreamedForward | None = None
        self.data = memory
        self.arrived: torch.cuda.Event | None = None
        self.free: torch.cuda.Event | None = None


class WeightStream:
    """Brings a component's weights to a device, the next one while a layer works: there are two places for them.

    Which is next is what was next the last time; told apart are forwards, those that a checkpoint's backward does once
    more, and backwards. Copies and work wait for each other on the card alone: the processor may run ahead.

    Attributes:
        most: bytes of the largest weight.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.most = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: dict[_Turn, StreamedForward] = {}
        self._last: _Turn | None = None
        self._places: list[_Place] = []  # of the weight in use, or last used, and of the next

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightStream:
        """A stream of the copy's own, which has to learn what comes next."""
        copied = WeightStream(self.device)
        copied.most = self.most
        return copied

    def take(self, owner: StreamedForward, *, backward: bool) -> Tensor:
        """The weight's bytes on the device, for work that is asked for before the next call."""
        following = self._following(owner, backward=backward)
        used, other = self._places or self._make_places()
        if used.owner is not owner:
            if other.owner is not owner:
                self._send(owner, other)
            used.free = self._now()  # all that was asked for with that weight is asked for by now
            used, other = self._places = [other, used]
            if used.arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(used.arrived)
        if following is not None and following not in (used.owner, other.owner):
            self._send(following, other)
        return used.data

    def _following(self, owner: StreamedForward, *, backward: bool) -> StreamedForward | None:
        """Who comes next, if that is known."""
        again = torch._C._current_graph_task_id() != -1  # within a backward
        turn: _Turn = (owner, "backward" if backward else "recomputed" if again else "forward")
        if self._last is not None:
            self._next[self._last] = owner
        self._last = turn
        return self._next.get(turn)

    def _make_places(self) -> list[_Place]:
        with torch.inference_mode(False):  # or no later step could write there
            both = torch.empty(2, _aligned(self.most), dtype=torch.uint8, device=self.device)
        if self._side is not None:
            both.record_stream(self._side)  # where it is written to, perhaps still as this goes
        self._places = [_Place(memory) for memory in both]
        for place in self._places:
            place.free = self._now()  # the memory may have been another's until now
        return self._places

    def _now(self) -> torch.cuda.Event | None:
        """When the work is done that has been asked for."""
        return torch.cuda.current_stream(self.device).record_event() if self._side is not None else None

    def _send(self, owner: StreamedForward, place: _Place) -> None:
        place.owner, place.data = owner, _as(place.memory, owner.home)
        if self._side is None:
            place.data.copy_(owner.home)
            return
        with torch.cuda.stream(self._side):
            if place.free is not None:
                self._side.wait_event(place.free)
            place.data.copy_(owner.home, non_blocking=True)
            place.arrived = self._side.record_event()
