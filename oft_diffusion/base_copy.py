"""What merging keeps of the base, so that it can be put back to the bit."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oft_diffusion.errors import AdapterError
from oft_diffusion.quantized import QuantizedWeight

Weight: TypeAlias = Tensor | QuantizedWeight

_SAMPLED = 8  # of a merged weight's rows, to know it again


class Kept(NamedTuple):
    """Weights on the CPU. Those of a quantized layer are several tensors, `<layer>/<part>`, and notes beside them."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    layers: Collection[str]


def write(weight: Weight, name: str, kept: Kept) -> None:
    """Put a layer's weight back."""
    if isinstance(weight, QuantizedWeight):
        start = f"{name}/"
        own = {key.removeprefix(start): tensor for key, tensor in kept.tensors.items() if key.startswith(start)}
        weight.put_back(own, kept.notes[name])
    else:
        weight.copy_(kept.tensors[name])


class BaseCopy:
    """Weights as they were before a merge, in memory or in a temporary file.

    Attributes:
        layers: whose they are.
    """

    def __init__(self, weights: Mapping[str, Weight], where: Literal["cpu", "disk"]) -> None:
        self.layers = tuple(weights)
        self._merged: dict[str, Tensor] = {}
        self._notes = {name: w.notes() for name, w in weights.items() if isinstance(w, QuantizedWeight)}
        copies = {key: t.detach().to("cpu", copy=True) for name, w in weights.items() for key, t in _parts(name, w)}
        self._memory: dict[str, Tensor] | None = copies if where == "cpu" else None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if where == "disk":
            self._folder = tempfile.TemporaryDirectory(prefix="oft-base-")
            try:
                save_file({n: w.contiguous() for n, w in copies.items()}, self._path())
            except (OSError, SafetensorError) as error:
                raise AdapterError(
                    f"the base's weights cannot be kept in {self._folder.name} ({error})",
                    expected="a temporary folder with room for a copy of the adapted layers",
                    fix='free some space, point TMPDIR elsewhere, or use keep_base="cpu"',
                ) from error

    def read(self) -> Kept:
        """The copied weights.

        Raises:
            AdapterError: the temporary file is gone or broken.
        """
        return Kept(self._tensors(), self._notes, self.layers)

    def _tensors(self) -> dict[str, Tensor]:
        if self._memory is not None:
            return self._memory
        try:
            return load_file(self._path())
        except (OSError, SafetensorError) as error:
            raise AdapterError(
                f"the base's weights cannot be read again from {self._path()} ({error})",
                expected="the copy that merging put there",
                fix="load the base model again",
            ) from error

    def note(self, weights: Mapping[str, Weight]) -> None:
        """Take samples of the weights as merging leaves them."""
        self._merged = {name: _sample(weight) for name, weight in weights.items()}

    def has_changed(self, name: str, weight: Weight) -> bool:
        """Whether a merged weight is another by now, not only rounded: cast, or with a LoRA fused and unfused."""
        then = self._merged[name]
        # A cast to 16 bits and back may lie behind it.
        eps = torch.finfo(torch.float32 if isinstance(weight, QuantizedWeight) else weight.dtype).eps
        rounding = max(eps / 2, 2.0**-10)
        return bool((_sample(weight) - then).norm() > 4.0 * rounding * then.norm())

    def _path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "base.safetensors"

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled bank cannot share a temporary file whose owner deletes it.
        return vars(self) | {"_memory": dict(self._tensors()), "_folder": None}


def _parts(name: str, weight: Weight) -> list[tuple[str, Tensor]]:
    if isinstance(weight, QuantizedWeight):
        return [(f"{name}/{part}", tensor) for part, tensor in weight.tensors().items()]
    return [(name, weight)]


def _sample(weight: Weight) -> Tensor:
    """A few of a weight's rows, as a copy."""
    rows = weight.dequantized() if isinstance(weight, QuantizedWeight) else weight.detach()
    step = max(1, len(rows) // _SAMPLED)
    return rows[::step][:_SAMPLED].to("cpu", torch.float32, copy=True)
