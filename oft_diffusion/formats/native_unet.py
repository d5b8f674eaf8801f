"""Names in the native checkpoints of Stable Diffusion's UNets (1.x, 2.x, SDXL), which number blocks through."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from oft_diffusion.formats.native_dit import Leaf, Native

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Entries of a block other than its transformers, which name their layers alike.
_PARTS = {"resnets": _RESNET, "downsamplers": {"conv": "op"}, "upsamplers": {"conv": "conv"}}
_TRANSFORMER = re.compile(r"proj_in|proj_out|transformer_blocks\..+")
_ENTRY = re.compile(r"(?P<entry>(?:(?:down|up)_blocks\.\d+|mid_block)\.(?P<kind>\w+)\.(?P<index>\d+))\.(?P<inner>.+)")


def unet_names(layers: Iterable[str]) -> Native:
    """The native name of every layer that has one; empty for a UNet of another kind than Stable Diffusion's.

    How many blocks there are, and which have attention or change the resolution, is read off the names.
    """
    layers = list(layers)
    entries = [match for match in map(_ENTRY.fullmatch, layers) if match]
    places = dict(_places({match["entry"] for match in entries}))
    names: Native = {_ENDS[layer]: (Leaf(layer),) for layer in layers if layer in _ENDS}
    for match in entries:
        inner = _inner(match["kind"], match["inner"])
        if inner is None or match["entry"] not in places:
            return {}
        names[f"{places[match['entry']]}.{inner}"] = (Leaf(match.string),)
    return names


def _inner(kind: str, name: str) -> str | None:
    if kind == "attentions":
        return name if _TRANSFORMER.fullmatch(name) else None
    return _PARTS.get(kind, {}).get(name)


def _places(entries: set[str]) -> Iterator[tuple[str, str]]:
    """Where each of a UNet's resnets, transformers and samplers stands in the native numbering."""
    for k in _counted(entries, "mid_block.resnets"):
        yield f"mid_block.resnets.{k}", f"middle_block.{2 * k}"
        yield f"mid_block.attentions.{k}", f"middle_block.{2 * k + 1}"
    number = 1  # after conv_in
    for block in _counted(entries, "down_blocks", below=".resnets.0"):
        down = f"down_blocks.{block}"
        for k in _counted(entries, f"{down}.resnets"):
            yield f"{down}.resnets.{k}", f"input_blocks.{number}.0"
            yield f"{down}.attentions.{k}", f"input_blocks.{number}.1"
            number += 1
        if f"{down}.downsamplers.0" in entries:
            yield f"{down}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    number = 0
    for block in _counted(entries, "up_blocks", below=".resnets.0"):
        up = f"up_blocks.{block}"
        for k in _counted(entries, f"{up}.resnets"):
            yield f"{up}.resnets.{k}", f"output_blocks.{number}.0"
            yield f"{up}.attentions.{k}", f"output_blocks.{number}.1"
            number += 1
        # Beside the block's last resnet, and after its transformer if there is one.
        place = 2 if f"{up}.attentions.0" in entries else 1
        yield f"{up}.upsamplers.0", f"output_blocks.{number - 1}.{place}"


def _counted(entries: set[str], blocks: str, below: str = "") -> Iterator[int]:
    index = 0
    while f"{blocks}.{index}{below}" in entries:
        yield index
        index += 1
