"""What a file tells of itself so that loading can prove it: probes of rotations and layers, a fingerprint of the base.

A digest proves the bits. The first probe, of each rotation by itself, proves that they are unpacked, signed and summed
as they were when the file was written. The second, through adapted layers of the very base, proves that each rotation
sits on the layer it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.hooks import unwrap
from oft_diffusion.inject import KEY_SUFFIX, SCALE_SUFFIX
from oft_diffusion.rotation import block_size_of, rotate_vectors
from oft_diffusion.targets import canonical_name, normalise_name

TOLERANCE = 1e-6  # of probes in float64, against another machine's
_ROUNDING = 2.0**-7  # of a weight in bfloat16, whichever way it came there
_SAMPLED = 64  # tensors of a base
_PROBED = 16  # layers per component for the second probe

Same = Literal["equal", "rounded", "other", "unknown"]


def rotation_probes(state: Mapping[str, Tensor], config: OFTConfig) -> dict[str, float]:
    """One number per layer, in float64: `v (x R)` with vectors x and v that only the number of features determines.

    Args:
        state: a component's tensors as files hold them.
        config: its settings.
    """
    layers = _layers(state)
    vectors = {layer: _vector(_features(state, layer), 1) for layer in layers}
    turned = _rotate(vectors, state, config)
    return {canonical_name(layer): float(_vector(len(y), 2) @ y) for layer, y in turned.items()}


def layer_probes(module: nn.Module, state: Mapping[str, Tensor], config: OFTConfig) -> dict[str, float]:
    """One number for each of some layers: `v (W (x R))`, or `v (R^T W x)`, with vectors that are always the same.

    Layers without a floating weight in memory (quantized, offloaded) are left out.
    """
    weights = {canonical_name(name): weight for name, weight in _weights(module)}
    layers = _layers(state)
    some = [layer for layer in layers[:: max(1, len(layers) // _PROBED)][:_PROBED] if canonical_name(layer) in weights]
    found: dict[str, float] = {}
    for layer in some:
        weight, features = weights[canonical_name(layer)].detach().cpu().double(), _features(state, layer)
        if config.side == "output":
            y = _rotate({layer: weight.flatten(1) @ _vector(weight[0].numel(), 1)}, state, config)[layer]
        else:  # of a convolution, its channels at every tap, or its patches
            x = _rotate({layer: _vector(features, 1)}, state, config)[layer]
            y = torch.einsum("oct,c->o", weight.view(len(weight), features, -1), x)
        found[canonical_name(layer)] = float(_vector(len(y), 2) @ y)
    return found


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Of a base: its architecture and samples of its weights, never a hash of gigabytes.

    `config` is a digest of the tensors' names and shapes, `bytes` one of the sampled bits, `samples` the sampled
    numbers (None where a tensor is not in memory or not floating).
    """
    named = [(canonical_name(normalise_name(name)), t) for name, t in unwrap(module).state_dict().items()]
    named = sorted((name, t) for name, t in named if isinstance(t, Tensor) and ".lora_" not in name)
    shapes = hashlib.sha256(json.dumps([(name, list(t.shape)) for name, t in named]).encode()).hexdigest()
    step = max(1, len(named) // _SAMPLED)
    samples, digest = [], hashlib.sha256()
    for name, tensor in named[::step][:_SAMPLED]:
        readable = tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0
        place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % max(1, tensor.numel())
        value = tensor.detach().flatten()[place].cpu() if readable else None
        samples.append(None if value is None else float(value))
        digest.update(f"{name}|{tensor.dtype}|{samples[-1]!r}".encode())
    return {"config": shapes, "bytes": digest.hexdigest(), "samples": samples}


def compare(known: Mapping[str, Any], here: Mapping[str, Any]) -> Same:
    """Whether two fingerprints are of one base, exactly or up to half precision; "unknown" where nothing can tell."""
    if known.get("config") != here["config"]:
        return "other"
    if known.get("bytes") == here["bytes"]:
        return "equal"
    pairs = [(a, b) for a, b in zip(known.get("samples", ()), here["samples"], strict=False) if None not in (a, b)]
    if not pairs:
        return "unknown"
    same = all(abs(a - b) <= _ROUNDING * max(abs(a), abs(b)) + 1e-7 for a, b in pairs)
    return "rounded" if same else "other"


def differing(known: Mapping[str, float], here: Mapping[str, float]) -> list[str]:
    """Layers that both have and whose probes differ, in order of names."""
    common = sorted(known.keys() & here.keys())
    return [name for name in common if not math.isclose(known[name], here[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE)]


def _layers(state: Mapping[str, Tensor]) -> list[str]:
    return sorted(key.removesuffix(KEY_SUFFIX) for key in state if key.endswith(KEY_SUFFIX))


def _features(state: Mapping[str, Tensor], layer: str) -> int:
    blocks, width = state[layer + KEY_SUFFIX].shape
    size = block_size_of(width)
    assert size is not None
    return int(blocks * size)


def _rotate(vectors: Mapping[str, Tensor], state: Mapping[str, Tensor], config: OFTConfig) -> dict[str, Tensor]:
    """Each layer's vector, rotated (and scaled) in float64; layers of one block size together."""
    found: dict[str, Tensor] = {}
    for width in {state[layer + KEY_SUFFIX].shape[1] for layer in vectors}:
        here = [layer for layer in vectors if state[layer + KEY_SUFFIX].shape[1] == width]
        packed = [state[layer + KEY_SUFFIX].detach().cpu().double() for layer in here]
        rows = torch.cat([vectors[layer].view(len(p), -1) for layer, p in zip(here, packed, strict=True)])
        turned = rotate_vectors(rows, torch.cat(packed), config).split([len(p) for p in packed])
        for layer, y in zip(here, turned, strict=True):
            scale = state.get(layer + SCALE_SUFFIX)
            found[layer] = (y if scale is None else y * scale.detach().cpu().double()).flatten()
    return found


def _weights(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, child in unwrap(module).named_modules():
        weight = getattr(child, "weight", None) if not hasattr(child, "base_layer") else None
        if isinstance(weight, Tensor) and weight.dim() in (2, 4) and weight.is_floating_point() and not weight.is_meta:
            yield normalise_name(name), weight


def _vector(features: int, seed: int) -> Tensor:
    """Numbers between -1 and 1 that are the same everywhere: fractional parts of multiples of the golden ratio."""
    steps = torch.arange(1, features + 1, dtype=torch.float64)
    return 2.0 * torch.frac(steps * (0.6180339887498949 * seed) + 0.1 * seed) - 1.0
