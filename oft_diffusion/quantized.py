"""The weights of quantized layers: as floats where they are asked for, quantized anew, and back to the bit.

Live adapters need none of this: they rotate a layer's input, and the layer multiplies as it always does. Merging does.
One class for each library, told by the class of the weight, so that none is imported that is not in use.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from oft_diffusion.errors import TargetError


class LayerWeight(ABC):
    """One layer's weight, in whatever way it is kept.

    Attributes:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    @property
    def weight(self) -> Any:
        """The layer's parameter, of a class of the library's."""
        return self.layer._parameters["weight"]

    @abstractmethod
    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight as the layer multiplies by it, `(out, in)`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that the weight consists of, by name, where it lies in the layer."""

    def bulk(self) -> Tensor:
        """Of `tensors` the one that holds nearly all bytes."""
        return max(self.tensors().values(), key=lambda tensor: tensor.nbytes)

    def exchange(self, data: Tensor) -> None:
        """Have the layer look for `bulk` in a copy of it, on whatever device. Scales and the like stay as they are."""
        self.weight.data = data


class QuantizedWeight(LayerWeight):
    """One that a library has quantized. Its `values` are in new memory."""

    def dequantized(self) -> Tensor:
        """`values` in float32."""
        return self.values(torch.float32)

    @abstractmethod
    def quantize(self, weight: Tensor) -> None:
        """Put another weight `(out, in)` in, quantized as the old one was.

        Raises:
            TargetError: the library cannot quantize to this kind, only read it.
        """

    def notes(self) -> Any:
        """What belongs to `tensors` and is no tensor; plain objects."""
        return None

    def put_back(self, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Restore what `tensors` and `notes` returned, to the bit."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


class FourBit(QuantizedWeight):
    """bitsandbytes' `Linear4bit`: codes, a scale per block, and where these are quantized themselves, theirs."""

    _STATE = ("absmax", "code", "offset")

    def values(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return found.to(dtype)

    def stay_unpacked(self) -> None:
        """Have a processor with bfloat16 instructions leave the layer as it is.

        There the layer packs itself for drawing, at its first call in eval mode: its scales are rounded to bfloat16,
        and no gradient passes from then on, in training neither.
        """
        if getattr(self.weight.quant_state, "packing_format_for_cpu", False):
            self.layer.state_dict()  # takes it back, but for the scales' rounding
        self.layer.support_avx512bf16_for_cpu = False

    def quantize(self, weight: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        old, state = self.weight, self.weight.quant_state
        dtype = getattr(state, "original_dtype", state.dtype)
        data, state = quantize_4bit(
            weight.to(old.device, dtype).contiguous(), blocksize=old.blocksize, quant_type=old.quant_type,
            compress_statistics=old.compress_statistics, quant_storage=old.quant_storage,
        )  # fmt: skip
        self._put(data, state)

    def tensors(self) -> dict[str, Tensor]:
        found = {"data": self.weight.data}
        for prefix, state in self._states():
            found |= {prefix + name: t for name in self._STATE if isinstance(t := getattr(state, name, None), Tensor)}
        return found

    def notes(self) -> Any:
        return {
            prefix: {name: value for name, value in vars(state).items() if not isinstance(value, Tensor)}
            for prefix, state in self._states()
        }

    def put_back(self, tensors: Mapping[str, Tensor], notes: Any) -> None:
        old = self.weight
        state = copy.copy(old.quant_state)
        vars(state).clear()
        for prefix, plain in notes.items():
            part = state
            if prefix:
                part = copy.copy(state)
                vars(part).clear()
                state.state2 = part
            vars(part).update({name: value for name, value in plain.items() if name != "state2"})
            for name in self._STATE:
                if prefix + name in tensors:
                    setattr(part, name, tensors[prefix + name].to(old.device, copy=True))
        if "state2." not in notes and "state2" in notes[""]:
            state.state2 = None
        self._put(tensors["data"].to(old.device, copy=True), state)

    def _states(self) -> Iterator[tuple[str, Any]]:
        state = self.weight.quant_state
        yield "", state
        if getattr(state, "state2", None) is not None:
            yield "state2.", state.state2

    def _put(self, data: Tensor, state: Any) -> None:
        self.weight.data = data
        self.weight.quant_state = self.layer.quant_state = state


class EightBit(QuantizedWeight):
    """bitsandbytes' `Linear8bitLt` (LLM.int8): bytes and a scale per row, which its first call moves into a state."""

    def values(self, dtype: torch.dtype) -> Tensor:
        data, scale = self.tensors().values()
        return data.to(dtype, copy=True).mul_(scale.float().view(-1, 1) / 127.0)

    def quantize(self, weight: Tensor) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        data, scale = self.tensors().values()
        codes, scales, _ = int8_vectorwise_quant(weight.to(data.device, torch.float16))
        data.copy_(codes)
        scale.copy_(scales)

    def follow(self) -> None:
        """Take what `Module.to` left behind, which moves the parameter's data alone, to where that is by now."""
        self.exchange(self.weight.data)
        for holder in (self.weight, self.layer.state):
            if holder.SCB is not None:
                holder.SCB = holder.SCB.to(self.weight.data.device)

    def exchange(self, data: Tensor) -> None:
        """As in `LayerWeight`; the layer puts `CB` back into its parameter after each call."""
        self.weight.data = data
        for holder in (self.weight, self.layer.state):
            if holder.CB is not None:
                holder.CB = data

    def tensors(self) -> dict[str, Tensor]:
        holder = self.layer.state if self.layer.state.CB is not None else self.weight
        data = holder.CB if holder.CB is not None else self.weight.data
        return {"data": data, "scale": holder.SCB}


class OfSubclass(QuantizedWeight):
    """A weight that is a subclass of Tensor, made of others: torchao's and quanto's.

    Attributes:
        owner: how the names of modules begin that such tensors' classes come from.
    """

    owner: ClassVar[str]

    def values(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.weight.dequantize()
        return found.to(dtype)

    def quantize(self, weight: Tensor) -> None:
        own = self.weight
        made = self.made_of(weight.to(own.device, own.dtype))
        for name, tensor in _inner(made).items():
            self.tensors()[name].copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        return _inner(self.weight)  # its `data` is another object, with tensors of its own, all on one device

    def exchange(self, data: Tensor) -> None:
        """As in `LayerWeight`."""
        self.bulk().data = data

    @abstractmethod
    def made_of(self, weight: Tensor) -> Tensor:
        """A weight quantized as the layer's is."""


class TorchAO(OfSubclass):
    """torchao's: the class of the tensor says how it was quantized."""

    owner = "torchao"

    def made_of(self, weight: Tensor) -> Tensor:
        own = self.weight
        known: dict[str, Any] = {name: getattr(own, name) for name in _plain_attributes(own)}
        if isinstance(size := known.get("block_size"), (list, tuple)):
            known["granularity"] = _granularity(list(size), list(own.shape))
        if isinstance(data := getattr(own, "qdata", None), Tensor):
            known["float8_dtype"] = data.dtype
        make = getattr(type(own), "from_hp", None)
        if make is None:
            raise _read_only(self.layer, type(own).__name__)
        wanted = inspect.signature(make).parameters
        made: Tensor = make(weight, **{name: value for name, value in known.items() if name in wanted})
        return made


class Quanto(OfSubclass):
    """optimum-quanto's."""

    owner = "optimum.quanto"

    def made_of(self, weight: Tensor) -> Tensor:
        from optimum.quanto import SymmetricOptimizer, quantize_weight

        layer = self.layer
        how: dict[str, Any] = {"qtype": layer.weight_qtype, "axis": 0}
        if isinstance(layer.optimizer, SymmetricOptimizer):
            found: dict[str, Any] = {"scale": layer.optimizer(weight, **how)}
        else:
            scale, shift = layer.optimizer(weight, group_size=layer.weight_group_size, **how)
            found = {"scale": scale, "shift": shift, "group_size": layer.weight_group_size}
        made: Tensor = quantize_weight(weight, activation_qtype=layer.activation_qtype, **how, **found)
        return made


class GGUF(QuantizedWeight):
    """diffusers' `GGUFLinear`: llama.cpp's blocks as bytes."""

    def values(self, dtype: torch.dtype) -> Tensor:
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        found: Tensor = dequantize_gguf_tensor(self.weight)
        return found.to(self.layer.compute_dtype).to(dtype)  # as the layer rounds it

    def quantize(self, weight: Tensor) -> None:
        import gguf

        kind = self.weight.quant_type
        try:
            made = gguf.quants.quantize(weight.float().cpu().numpy(), kind)
        except NotImplementedError as error:
            raise _read_only(self.layer, f"GGUF of kind {kind.name}") from error
        self.tensors()["data"].copy_(torch.from_numpy(made))

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.weight.as_tensor()}


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """What a layer keeps its weight in, where that is quantized by a library that we know; None elsewhere.

    The layer's `weight` is looked up among its parameters, never read as an attribute.
    """
    weight = layer._parameters.get("weight")
    name = type(weight).__name__
    if name in _BITSANDBYTES:
        return _BITSANDBYTES[name](layer)
    if name == "GGUFParameter":
        return GGUF(layer)
    for kind in (TorchAO, Quanto):
        if type(weight).__module__.startswith(kind.owner):
            return kind(layer)
    return None


_BITSANDBYTES: Mapping[str, type[QuantizedWeight]] = {"Params4bit": FourBit, "Int8Params": EightBit}


def send(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a component with all that its quantized weights consist of, so that nothing stays behind; the component."""
    module.to(device)
    for layer in module.modules():
        if isinstance(weight := quantized_weight(layer), EightBit):
            weight.follow()
    return module


def _inner(tensor: Any) -> dict[str, Tensor]:
    """The plain tensors inside of a subclass, by path."""
    found: dict[str, Tensor] = {}
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        part = getattr(tensor, name)
        if hasattr(part, "__tensor_flatten__"):
            found |= {f"{name}.{inner}": own for inner, own in _inner(part).items()}
        else:
            found[name] = part
    return found


def _plain_attributes(tensor: Any) -> list[str]:
    """Names of a torchao tensor's settings."""
    names = [*getattr(tensor, "tensor_attribute_names", ()), *getattr(tensor, "optional_tensor_attribute_names", ())]
    return [name for name in names if name != "dtype"]


def _granularity(block: list[int], shape: list[int]) -> Any:
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    if block == shape:
        return PerTensor()
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


def _read_only(layer: nn.Module, kind: str) -> TargetError:
    return TargetError(
        f"a {type(layer).__name__} holds {kind}, which can be read but not written",
        expected="a kind that its library quantizes to",
        fix="keep the adapter live, or merge into the base before it is quantized",
    )
