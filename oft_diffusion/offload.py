"""Where a layer's tensors lie while accelerate or diffusers keep them elsewhere between forwards.

Both wrap a module's `forward`: hooks of torch run before that has fetched a tensor, and after it has put it away again.
"""

from __future__ import annotations

from torch import Tensor, nn


def stored(layer: nn.Module, name: str) -> Tensor | None:
    """A layer's own tensor, by name, where it lies between forwards: what is written to it lasts.

    Returns:
        None where the layer has none, or not in memory.
    """
    tensor = layer._parameters.get(name)  # as an attribute it may be computed, or raise
    if tensor is None or _is_on_disk(layer):
        return None
    return tensor if not tensor.is_meta else _kept_for(layer, name)


def is_on_disk(model: nn.Module) -> bool:
    """Whether a part of a model is in diffusers' group offloading to disk, which leaves garbage in its tensors."""
    return any(map(_is_on_disk, model.modules()))


def _is_on_disk(module: nn.Module) -> bool:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks.values())


def _kept_for(layer: nn.Module, name: str) -> Tensor | None:
    """What accelerate's sequential offloading fetches for a tensor on the meta device."""
    hook = getattr(layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # one, or several behind each other
        kept = getattr(each, "weights_map", None) or {}
        if name in kept:
            tensor = kept[name]
            return tensor if kept[name] is tensor else None  # a file is read anew each time
    return None
