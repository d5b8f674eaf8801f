"""OFTv2 for diffusers: orthogonal finetuning made fast (arXiv 2506.19847).

On any module: `inject_oft`, `remove_oft`, `merge_oft`, `unmerge_oft`, `oft_state_dict`, `load_oft_state_dict`.
In a diffusers pipeline: `load_oft_weights`, `set_oft_adapters`, `enable_oft_adapters`, `disable_oft_adapters`,
`oft_adapters_per_image`, `list_oft_adapters`, `fuse_oft`, `unfuse_oft`, `unload_oft_weights`, `save_oft_weights`.
On the hub: `push_oft_weights`, `write_model_card`.
Training: `oft_diffusion.training`.
"""

from oft_diffusion import quiet as quiet  # before anything that imports diffusers
from oft_diffusion.bank import OFTBank
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import OFTError
from oft_diffusion.inject import inject_oft, load_oft_state_dict, oft_state_dict, remove_oft
from oft_diffusion.merge import merge_oft, unmerge_oft
from oft_diffusion.pipeline import (
    disable_oft_adapters,
    enable_oft_adapters,
    fuse_oft,
    list_oft_adapters,
    load_oft_weights,
    oft_adapters_per_image,
    push_oft_weights,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
    unload_oft_weights,
    write_model_card,
)

__version__ = "0.1.0"

__all__ = [
    "OFTBank",
    "OFTConfig",
    "OFTError",
    "disable_oft_adapters",
    "enable_oft_adapters",
    "fuse_oft",
    "inject_oft",
    "list_oft_adapters",
    "load_oft_state_dict",
    "load_oft_weights",
    "merge_oft",
    "oft_adapters_per_image",
    "oft_state_dict",
    "push_oft_weights",
    "remove_oft",
    "save_oft_weights",
    "set_oft_adapters",
    "unfuse_oft",
    "unload_oft_weights",
    "unmerge_oft",
    "write_model_card",
]
