"""What another tool's file was trained on, as far as it tells: for messages about files that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# The first that is in some layer's name, with underscores for dots.
_SIGNS = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "a Flux-like transformer"),
    (r"joint_blocks", "Stable Diffusion 3's transformer"),
    (r"(down|up|input|output)_blocks\w*transformer_blocks_[1-9]", "Stable Diffusion XL's UNet"),
    (r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block", "a Stable Diffusion UNet"),
    (r"(?<!joint_)transformer_blocks_\d", "a diffusion transformer"),
    (r"self_attn_[qkv]_proj|SelfAttention", "a text encoder"),
    (r"(^|_)(blocks|layers)_\d", "a transformer"),
)
_LONGEST = 200  # letters of a name that are looked at
_HEADERS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")


def guessed_base(header: Mapping[str, str], config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """What a file says that it was trained on, else what its layers' names look like."""
    mapping = config.get("auto_mapping")
    told = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    told = told or next((header[entry] for entry in _HEADERS if header.get(entry)), None)
    if isinstance(told, str) and told:
        return told[:80]
    names = [key[:_LONGEST].replace(".", "_") for key in keys]  # a hostile one of megabytes would take for ever
    return next((what for sign, what in _SIGNS if any(re.search(sign, name) for name in names)), "another model")
