"""OFTv2 for diffusers: orthogonal finetuning made fast (arXiv 2506.19847).

On any module: `inject_oft`, `remove_oft`, `merge_oft`, `unmerge_oft`, `oft_state_dict`, `load_oft_state_dict`.
"""

from oft_diffusion.bank import OFTBank
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import OFTError
from oft_diffusion.inject import inject_oft, load_oft_state_dict, oft_state_dict, remove_oft
from oft_diffusion.merge import merge_oft, unmerge_oft

__version__ = "0.1.0"

__all__ = [
    "OFTBank",
    "OFTConfig",
    "OFTError",
    "inject_oft",
    "load_oft_state_dict",
    "merge_oft",
    "oft_state_dict",
    "remove_oft",
    "unmerge_oft",
]
