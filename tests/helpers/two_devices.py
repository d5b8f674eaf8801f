"""Streamed weights as a card has them, on a processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oft_diffusion.frozen import FrozenForward
from oft_diffusion.quantized import EightBit, LayerWeight, OfSubclass
from oft_diffusion.streaming import StreamedForward


def pretend_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its calls a streamed weight lies on another device, here `meta`: whoever reads it gets nothing."""

    def exchange(weight: Any, data: Tensor) -> None:
        away = data if data is not homes.get(weight.layer) else data.to("meta")
        if isinstance(weight, OfSubclass):
            own = weight.weight
            names, _ = own.__tensor_flatten__()
            setattr(own, max(names, key=lambda name: getattr(own, name).nbytes), away)
            return
        parameter = weight.layer._parameters["weight"]
        made = torch.Tensor._make_subclass(type(parameter), away, False)
        made.__dict__.update(parameter.__dict__)
        weight.layer._parameters["weight"] = made
        if isinstance(weight, EightBit):
            for holder in (made, weight.layer.state):
                if holder.CB is not None:
                    holder.CB = away

    homes: dict[nn.Module, Tensor] = {}

    def begin(self: StreamedForward, weight: Any, stream: Any, places: Any) -> None:
        FrozenForward.__init__(self, weight)
        self.stream, self.home = stream, places.copy(weight.bulk())
        stream.most = max(stream.most, self.home.nbytes)
        homes[weight.layer] = self.home
        weight.exchange(self.home)

    for kind in (LayerWeight, EightBit, OfSubclass):
        monkeypatch.setattr(kind, "exchange", exchange)
    monkeypatch.setattr(StreamedForward, "__init__", begin)
