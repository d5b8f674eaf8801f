"""Files of the input-side OFT (OFTv2): one packed generator per layer, as PEFT packs it.

The tools agree on linear layers: `W R^T`, with the series of five terms. They differ in convolutions (most take `W R`),
in scales, in how a bound (COFT) is told, and in PEFT's series: `origins` tells how each is to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.formats.source import Match, Source
from oft_diffusion.inject import KEY_SUFFIX, noted_block_size
from oft_diffusion.rotation import block_size_of, generator_divisor
from oft_diffusion.targets import taps_of

MARKER = "oft_R.scaled_oft"
# Settings that forks tell as tensors of each layer.
_SIZES = ("alpha", "oft_block_size_metadata", "oft_block_size_buffer")
_SHARES = ("oft_block_share_metadata", "oft_block_share_buffer")
NEUMANN = {"parametrisation": "cayley_neumann", "neumann_order": 4}  # everybody's five terms


@dataclass(frozen=True)
class Reading:
    """How a file's packed vectors become ours: bounded first, then divided, then negated.

    Attributes:
        settings: of `OFTConfig`: the series.
        linear_sign: of linear layers: -1 where the tool's rotation is the transpose of ours.
        conv_sign: of convolutions.
        eps: COFT's bound, None where there is none.
        conv_eps: the same for convolutions.
        block_size: the one that was asked for, where the file tells; a layer's is the divisor of its inputs next to it.
        block_share: whether the file says that all blocks of a layer are one; None where it does not.
        divided: whether a layer's vectors are multiplied by a divisor that its tensors tell.
        legacy: whether that divisor is the one of builds before the merge, `sqrt(b(b-1)/2)`.
        kernels: whether convolutions larger than 1x1 are right in that tool.
        notes: sentences for the user.
    """

    settings: Mapping[str, Any]
    linear_sign: float = 1.0
    conv_sign: float = -1.0
    eps: float | None = None
    conv_eps: float | None = None
    block_size: int | None = None
    block_share: bool | None = None
    divided: Callable[[Mapping[str, Tensor]], bool] = lambda tensors: MARKER in tensors
    legacy: bool = False
    kernels: bool = True
    notes: tuple[str, ...] = ()


def read_packed(
    source: Source, matches: list[Match], readings: Mapping[str, Reading]
) -> dict[str, tuple[OFTConfig, dict[str, Tensor]]]:
    """Per component, its settings and its tensors as ours.

    Args:
        source: the file.
        matches: its layers.
        readings: how those of each component are to be read.

    Raises:
        AdapterFileError: a tensor's shape fits no block size or not its layer; a kernel that its tool gets wrong.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for match in matches:
        for layer, module in zip(match.meaning.layers, match.modules, strict=True):
            packed = _read_layer(source, match, module, readings[match.meaning.component])
            state = states.setdefault(match.meaning.component, {})
            if layer + KEY_SUFFIX in state:
                raise AdapterFileError(
                    f"{source.name} adapts {layer} of {match.meaning.component} twice, the second time as {match.key}",
                    expected="one rotation per layer",
                    fix="get the file again from its author",
                )
            state[layer + KEY_SUFFIX] = packed
    return {part: (OFTConfig(block_size=noted_block_size(state), targets=".*", **readings[part].settings), state)
            for part, state in states.items()}  # fmt: skip


def _read_layer(source: Source, match: Match, module: nn.Module, reading: Reading) -> Tensor:
    found = [name for name in ("oft_R.weight", "oft_rotation.weight") if name in match.tensors]
    if len(found) != 1:
        raise _misshapen(source, match.key, "two generators" if found else "no generator beside its other tensors")
    stored = match.tensors[found[0]]
    size = block_size_of(stored.shape[1]) if stored.dim() == 2 else None
    if not stored.is_floating_point() or size is None or not len(stored):
        raise _misshapen(source, match.key, f"a generator of shape {tuple(stored.shape)}, {stored.dtype}")
    is_conv = isinstance(module, nn.Conv2d)
    taps = taps_of(module)
    if taps > 1 and not reading.kernels:
        raise AdapterFileError(
            f"{source.name} adapts {match.key}, a convolution of {taps} taps, where PEFT's OFT rotates no weight, and "
            "changes the answer even at the start",
            expected="linear layers and 1x1 convolutions in a file of PEFT's",
            fix="leave convolutions out when training with PEFT",
        )
    features = (module.in_channels if isinstance(module, nn.Conv2d) else int(module.in_features)) * taps  # type: ignore[arg-type]
    if len(stored) * size != features and not (len(stored) == 1 and features % size == 0):
        raise _misshapen(
            source, match.key,
            f"{len(stored)} blocks of size {size}: it was trained on {source.trained_on}, and in this pipeline's "
            f"{match.meaning.component} ({match.owner}) that layer has {features} input features",
        )  # fmt: skip
    _check_told(source, match, stored, size, features, reading)
    packed = stored.double()
    eps = reading.conv_eps if is_conv else reading.eps
    if eps is not None:
        limit = eps / math.sqrt(len(packed) * 2)
        packed = packed * (limit / packed.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    if reading.divided(match.tensors):
        packed = packed / (math.sqrt(packed.shape[1]) if reading.legacy else generator_divisor(packed.shape[1]))
    packed = packed * (reading.conv_sign if is_conv else reading.linear_sign)
    # A shared block is every block's; and files hold what was trained, so no digits are lost for nothing.
    return packed.to(torch.float32).expand(features // size, -1).contiguous()


def _check_told(source: Source, match: Match, stored: Tensor, size: int, features: int, reading: Reading) -> None:
    """Refuse a generator that is not what the file says of it."""
    sizes: dict[str, float] = {name: scalar(match.tensors[name]) for name in _SIZES if name in match.tensors}
    if reading.block_size is not None:
        sizes["oft_block_size"] = reading.block_size
    for name, told in sizes.items():
        rounded = name in match.tensors and told == float(torch.tensor(size).to(match.tensors[name].dtype))
        if not rounded and _divisor_near(features, told) != size:
            raise _misshapen(source, match.key, f"blocks of size {size}, but {name}={told:g}")
    shares = {name: scalar(match.tensors[name]) for name in _SHARES if name in match.tensors}
    if reading.block_share is not None:
        shares["block_share"] = float(reading.block_share)
    for name, share in shares.items():
        if share not in (0, 1) or (len(stored) > 1 if share else len(stored) * size < features):
            raise _misshapen(source, match.key, f"{len(stored)} blocks, but {name}={share:g}")
    rank = match.tensors.get("oft_rank_buffer")
    if rank is not None and scalar(rank) not in (len(stored), features // size):
        raise _misshapen(source, match.key, f"{len(stored)} blocks, but oft_rank_buffer={scalar(rank):g}")


def _divisor_near(features: int, wanted: float) -> int | None:
    """What PEFT, OneTrainer and sd-scripts make of a block size: the divisor next to it, of two the smaller."""
    if wanted >= features:
        return features
    if wanted < 1 or not float(wanted).is_integer():
        return None
    lower = next(n for n in range(int(wanted), 0, -1) if features % n == 0)
    higher = next(n for n in range(int(wanted), features + 1) if features % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def scalar(tensor: Tensor) -> float:
    """A setting that is told as a tensor; infinite, which none may be, where it has several numbers."""
    return float(tensor) if tensor.numel() == 1 else math.inf


def _misshapen(source: Source, key: str, found: str) -> AdapterFileError:
    return AdapterFileError(
        f"{source.name} has for {key} {found}",
        expected="(blocks, b(b-1)/2) numbers whose blocks fill the layer's inputs, or one block for all",
        fix="load it onto the model that it was trained on, or get the file again",
    )
