"""OFT adapters in a diffusers pipeline, over all its components at once: load, weigh, mix, fuse, save."""

from oft_diffusion.pipeline.card import write_model_card
from oft_diffusion.pipeline.fusing import fuse_oft, unfuse_oft
from oft_diffusion.pipeline.loading import load_oft_weights
from oft_diffusion.pipeline.saving import describe_base, probe_layers, push_oft_weights, save_oft_weights
from oft_diffusion.pipeline.state import LoadedAdapter, list_oft_adapters
from oft_diffusion.pipeline.using import (
    disable_oft_adapters,
    enable_oft_adapters,
    oft_adapters_per_image,
    set_oft_adapters,
    unload_oft_weights,
)

__all__ = [
    "LoadedAdapter",
    "describe_base",
    "disable_oft_adapters",
    "enable_oft_adapters",
    "fuse_oft",
    "list_oft_adapters",
    "load_oft_weights",
    "oft_adapters_per_image",
    "probe_layers",
    "push_oft_weights",
    "save_oft_weights",
    "set_oft_adapters",
    "unfuse_oft",
    "unload_oft_weights",
    "write_model_card",
]
