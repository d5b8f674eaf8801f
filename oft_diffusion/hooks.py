"""The forward hooks that adapt a model: one on the component, one on every target layer.

The component's pre-hook has the bank prepare every delta once; each layer's pre-hook rotates that layer's input. Two
more kinds, for files of other tools, rotate its output or a convolution's patches. Hooks are objects, not closures, so
that a copied or pickled component carries hooks that work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from oft_diffusion.autocast import as_computed, compute_dtype
from oft_diffusion.errors import AdapterError, TargetError
from oft_diffusion.frozen import freeze_quantized, thaw_quantized
from oft_diffusion.kernels import block_rotate, processor, processor_graph
from oft_diffusion.offload import stored
from oft_diffusion.plan import Place, layer_of
from oft_diffusion.prepared import Prepared
from oft_diffusion.sharing import Ready, SharedInput, hand_out

if TYPE_CHECKING:
    from oft_diffusion.bank import OFTBank

Deltas = tuple[Tensor, ...]
_NOTHING: Deltas = ()


class LayerHook:
    """Rotates one layer's input by the deltas in its slot, one after another.

    Two slots, chosen by grad mode: a `no_grad` forward between a checkpointed forward and its backward must not
    replace what the recomputation will read. A slot is `()` where nothing is active, and None where nothing is
    prepared: then the bank decides.
    """

    def __init__(self, bank: OFTBank, site: str) -> None:
        self.bank = bank
        self.site = site
        self.grad_deltas: Deltas | None = ()
        self.eval_deltas: Deltas | None = ()
        self.fired = False
        self.shared: SharedInput | None = None  # with the layers that read the same input
        self.ready: Ready | None = None
        self.prepared: Prepared | None = None

    def register(self, module: nn.Module) -> None:
        """Hang this hook on its layer."""
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *_: Any) -> Any:
        if self.grad_deltas == _NOTHING == self.eval_deltas:
            self.fired = True
            return None  # no adapter of this layer is active, or all are merged
        x: Tensor = args[0] if args else self._input(args)
        rotated = self._at_once(module, x)
        if rotated is None:
            rotated = self._rotated(module, x)
        return (rotated, *args[1:])

    def _at_once(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What is ready, or prepared for; else None.

        For most layers this is all that runs in a step, where so much Python costs as much as a small rotation.
        """
        if torch.compiler.is_dynamo_compiling():
            return None
        grad = torch.is_grad_enabled()
        if grad and self.bank.between_forwards:
            self.bank.begin_recomputation(self.site)
        ready, own = self.ready, self.prepared
        if ready is not None:
            slot, version = self.grad_deltas if grad else self.eval_deltas, 0 if x.is_inference() else x._version
            as_it_was = ready.made_of is x and ready.version == version and ready.grad is grad
            if not as_it_was or not slot or ready.by is not slot[0] or ready.rotated.dtype is not x.dtype:
                return None
            self.ready, self.fired = None, True
            return ready.rotated
        if own is None or grad not in own.plan.flat.modes or not processor.fits(x, own.plan.size):
            return None
        if x.shape[-1] != own.plan.width or isinstance(module, nn.Conv2d):
            return None
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):  # the first is the faster to call
            return None
        made = processor_graph.rotated(x, own.plan)
        if own.others:
            hand_out(own.others, x, made, grad=grad)
        self.fired = True
        return made[own.own]

    def _rotated(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.shared is not None and self.shared.given_up(self, x):
            rotated = self._at_once(module, x)  # alone from now on, and as a recomputation will do it
            if rotated is not None:
                return rotated
        deltas = self._deltas_for(x)
        if deltas and isinstance(module, nn.Conv2d):
            return _rotate_channels(x, deltas)
        if self.shared is not None and len(deltas) == 1 and deltas[0].dim() == 3:
            return self.shared.rotate(self, x, deltas[0])
        return _rotate(x, deltas) if deltas else x

    def _input(self, args: tuple[Any, ...]) -> Tensor:
        if not args:
            raise TargetError(
                f"layer {layer_of(self.site)} was called with keyword arguments only",
                expected="its input as the first positional argument",
                fix="leave this layer out of the targets",
            )
        x: Tensor = args[0]
        return x

    def _own(self, module: nn.Module, name: str, y: Tensor) -> Tensor:
        """The layer's weight or bias beside its output: offloading has put it away by the time a hook sees that."""
        tensor = stored(module, name)
        if tensor is None:
            raise TargetError(
                f"the {name} of layer {layer_of(self.site)} is not in memory after its forward",
                expected="it in memory, or a merged adapter: this one, of another tool, rotates what the layer returns",
                fix="merge it (fuse_oft) before offloading, or offload to memory, not to disk",
            )
        return tensor.to(device=y.device, dtype=y.dtype)

    def _deltas_for(self, x: Tensor) -> Deltas:
        """The slot's deltas, in the device of what they are to rotate, and in the dtype that the layer computes in."""
        grad = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self.fired = True
            if grad and self.bank.between_forwards:
                self.bank.begin_recomputation(self.site)
        deltas = self.grad_deltas if grad else self.eval_deltas
        if deltas is None:
            deltas = self.bank.fresh_deltas(self.site)
        if not deltas:
            return deltas
        if deltas[0].dim() == 2:
            deltas = (self.bank.plans.delta_of(self.site, deltas[0]),)  # for an input that C does not take
        if deltas[0].dim() == 4 and x.shape[0] % deltas[0].shape[0]:
            deltas = self._deltas_of_some_rows(deltas, x)
        device = x.device
        dtype = compute_dtype(device, x.dtype) or x.dtype
        for delta in deltas:
            if delta.dtype != dtype or delta.device != device:
                return self.bank.fit_deltas(self, deltas, (device, dtype))
        return deltas

    def _deltas_of_some_rows(self, deltas: Deltas, x: Tensor) -> Deltas:
        """Of a mixed batch, where an attention takes copies of the images apart (perturbed guidance does)."""
        rows, images = x.shape[0], self.bank.images
        if images and rows < deltas[0].shape[0] and rows % images == 0:
            return tuple(delta[:rows] for delta in deltas)  # all copies have their images in one order
        raise AdapterError(
            f"layer {layer_of(self.site)} gets an input {tuple(x.shape)} in a batch of {deltas[0].shape[0]} rows, and "
            "nothing tells which part of it belongs to which row",
            expected="inputs whose first axis is the batch, or the batch times something",
            fix="draw with one adapter at a time on this model",
        )

    def __getstate__(self) -> dict[str, Any]:
        # Deltas are derived, and those of a training forward are part of a graph, which cannot be copied.
        return dict(self.__dict__, grad_deltas=None, eval_deltas=None, ready=None, prepared=None)


class OutputHook(LayerHook):
    """Rotates one layer's output, its bias aside: what `P W` instead of `W` would give."""

    def register(self, module: nn.Module) -> None:
        """Hang this hook on its layer."""
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        y: Tensor = output[0]
        deltas = self._deltas_for(y)
        if not deltas:
            return y
        channels = isinstance(module, nn.Conv2d)
        bias = None
        if module.bias is not None:
            bias = self._own(module, "bias", y)
            bias = bias.view(-1, 1, 1) if channels else bias
            y = y - bias
        y = _rotate_channels(y, deltas) if channels else _rotate(y, deltas)
        return y if bias is None else y + bias


class PatchHook(LayerHook):
    """Rotates the patches of a convolution's input, `(in, kh, kw)` flattened, as OneTrainer's OFT does.

    The layer's answer is kept, and what the rotation changes in the patches goes through its weight once more. A pass
    of its own, which merging saves.
    """

    def register(self, module: nn.Module) -> None:
        """Hang this hook on its layer, before those that rotate its output."""
        module.register_forward_hook(self, prepend=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        assert isinstance(module, nn.Conv2d)
        y, x = output[0], self._input(args)
        deltas = self._deltas_for(x)
        if not deltas:
            return y
        patches = as_computed(_patches(module, x))
        changed = (_rotate(patches, deltas) - patches) @ self._own(module, "weight", y).flatten(1).T
        return y + changed.transpose(1, 2).reshape(y.shape)


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output pixel's kernel meets, `(N, pixels, in kh kw)`."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode)
        padding: Any = 0
    else:
        padding = conv.padding
    unfolded = nn.functional.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
    return unfolded.transpose(1, 2)


HOOKS: dict[Place, type[LayerHook]] = {"input": LayerHook, "patches": PatchHook, "output": OutputHook}


def _rotate(x: Tensor, deltas: Deltas) -> Tensor:
    x = as_computed(x)
    for delta in deltas:
        x = block_rotate(x, delta)
    return x


def _rotate_channels(x: Tensor, deltas: Deltas) -> Tensor:
    """A convolution's input `(..., C, h, w)`: the same rotation at every tap. Its memory format stays."""
    rotated = _rotate(x.movedim(-3, -1), deltas).movedim(-1, -3)
    return rotated.contiguous() if x.is_contiguous() else rotated


class ComponentHook:
    """Before the component's forward: has the bank prepare all deltas, outside any gradient-checkpointed region."""

    def __init__(self, bank: OFTBank) -> None:
        self.bank = bank

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bank.begin_forward(module, *_placed(args, kwargs))


class MixingHook:
    """Before the forward of a mixed batch: has the bank gather each row's deltas.

    Apart from `ComponentHook`, and never compiled: a graph for every choice of names would soon reach the compiler's
    limit, while the model's own graphs know shapes only.
    """

    def __init__(self, bank: OFTBank) -> None:
        self.bank = bank

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bank.fill_rows(*_placed(args, kwargs), _batch_of(args, kwargs))


class ComponentEndHook:
    """After the component's forward, also one that raised: drops deltas that must not outlive it, audits."""

    def __init__(self, bank: OFTBank) -> None:
        self.bank = bank

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.bank.end_forward(module, failed=output is None)  # None is what torch passes after an error


def bank_of(model: nn.Module) -> OFTBank | None:
    """The bank whose hooks `model` carries, or None."""
    for hook in unwrap(model)._forward_pre_hooks.values():
        if isinstance(hook, ComponentHook):
            return hook.bank
    return None


def attach(model: nn.Module, bank: OFTBank) -> None:
    """Register the component's hooks, and have its quantized layers keep nothing."""
    freeze_quantized(model)
    model.register_forward_pre_hook(ComponentHook(bank), with_kwargs=True)
    model.register_forward_hook(ComponentEndHook(bank), always_call=True)


def attach_mixing(model: nn.Module, bank: OFTBank) -> None:
    """Register what a mixed batch needs beside the component's own hooks."""
    call = MixingHook.__call__
    if "torch._dynamo" in sys.modules and not hasattr(call, "_torchdynamo_disable"):
        MixingHook.__call__ = torch.compiler.disable(call)  # type: ignore[method-assign]
    model.register_forward_pre_hook(MixingHook(bank), with_kwargs=True)


def detach_mixing(model: nn.Module) -> None:
    """Remove what `attach_mixing` registered."""
    _remove(model, (MixingHook,))


def detach(model: nn.Module) -> None:
    """Remove every hook of ours from `model` and all its submodules, and whatever else `attach` did."""
    thaw_quantized(model)
    for module in model.modules():
        _remove(module, (LayerHook, ComponentHook, ComponentEndHook, MixingHook))


def _remove(module: nn.Module, kinds: tuple[type, ...]) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, h in hooks.items() if isinstance(h, kinds)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def hooked_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Target layers by site, as the bank spells them."""
    return {
        hook.site: module
        for module in unwrap(model).modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if isinstance(hook, LayerHook)
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper.

    Raises:
        TargetError: it is no module.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise TargetError(
            f"a {type(model).__name__} is no torch module",
            expected="one component of a pipeline, such as pipe.unet, or any other nn.Module",
            fix="pass that; whole pipelines are for load_oft_weights and its like",
        )
    return inner


def keep_for_recomputation(hooks: Iterable[LayerHook]) -> None:
    """Have grad slots keep what a recomputation reads, where nothing builds it again (`processor_graph.Rebuilt`).

    These are values that require grad, without the graph, which holds memory; of layers that share a generator they are
    one, as in the forward. A component compiled as a whole recomputes inside its own graph, from which no tensor may
    escape.
    """
    kept: dict[int, Tensor] = {}
    for hook in hooks:
        if hook.grad_deltas is None or torch.compiler.is_compiling():
            hook.grad_deltas = None
            continue
        for delta in hook.grad_deltas:
            if id(delta) not in kept:
                kept[id(delta)] = delta.detach().requires_grad_(delta.requires_grad)
        hook.grad_deltas = tuple(kept[id(delta)] for delta in hook.grad_deltas)


def _placed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """Device of a component's first tensor input, and the dtype that its layers compute in, as far as that tells."""
    x = _first_tensor(args, kwargs)
    if x is None:
        return None, None
    return x.device, compute_dtype(x.device, x.dtype if x.is_floating_point() else None)


def _batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of a component's input: of its first tensor that is not one number each, or of a list of tensors."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return len(value)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return len(value)
    return 1


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None
