"""What a file tells of itself so that loading can prove it: probes of rotations and layers, a fingerprint of the base.

A digest proves the bits. The first probe, of each rotation by itself, proves that they are unpacked, signed and summed
as they were when the file was written. The second, through adapted layers of the very base, proves that each rotation
sits on the layer it belongs to.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.hooks import unwrap
from oft_diffusion.inject import KEY_SUFFIX, SCALE_SUFFIX
from oft_diffusion.quantized import quantized_weight
from oft_diffusion.rotation import block_size_of, rotate_vectors
from oft_diffusion.targets import canonical_name, normalise_name

TOLERANCE = 1e-6  # of probes in float64, against another machine's
_SAMPLED = 64  # tensors of a base
_ROWS = 8  # of a layer's weight, for the second probe
# Of a config, what changes no answer of a component, or changes with libraries, added tokens and an IP-Adapter.
_NOT_SETTINGS = re.compile(
    r"_.*|sample_size|vocab_size|.*dtype|architectures|.*_version|initializer_.*|return_.*|use_cache|output_.*|"
    r".*_token_id|.*label.*|problem_type|.*dropout.*|encoder_hid_dim.*|projection_dim|gradient_checkpointing|tie_.*"
)
_NOT_BASE = (".lora_", "_ip.", "encoder_hid_proj.")  # of adapters that lie in a base's modules

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


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a component's layers that `layer_probes` can read, by canonical name."""
    found = ((normalise_name(name), floating_weight(child)) for name, child in unwrap(module).named_modules())
    return {canonical_name(name): weight for name, weight in found if weight is not None}


def floating_weight(layer: nn.Module) -> Tensor | None:
    """A linear layer's or convolution's weight where it is in memory and not quantized; of PEFT's wrappers none."""
    if hasattr(layer, "base_layer") or quantized_weight(layer) is not None:
        return None
    weight = layer._parameters.get("weight")  # as an attribute it may be computed, or raise
    is_one = isinstance(weight, Tensor) and weight.dim() in (2, 4) and weight.is_floating_point() and not weight.is_meta
    return weight if is_one else None


def layer_probes(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], config: OFTConfig) -> dict[str, float]:
    """One number per layer: `v (W (x R))`, or `v (R^T W x)`, with vectors that are always the same.

    Of W a few rows are enough to tell one layer from another, which keeps this cheap for the largest models.

    Args:
        weights: by canonical name; layers without one (quantized, offloaded) are left out.
        state: a component's tensors as files hold them.
        config: its settings.
    """
    layers = [layer for layer in _layers(state) if canonical_name(layer) in weights]
    is_output = config.side == "output"
    sizes = {layer: block_size_of(state[layer + KEY_SUFFIX].shape[1]) or 1 for layer in layers}
    rows = {n: _rows(weights[canonical_name(n)], sizes[n] if is_output else _ROWS) for n in layers}
    if is_output:  # those of the first block, which is turned among itself
        answers = {n: rows[n].flatten(1) @ _vector(rows[n][0].numel(), 1) for n in layers}
        blank = {n: torch.zeros(_features(state, n) - len(y), dtype=torch.float64) for n, y in answers.items()}
        answers = _rotate({n: torch.cat([y, blank[n]]) for n, y in answers.items()}, state, config)
    else:  # of a convolution, its channels at every tap, or its patches
        x = _rotate({n: _vector(_features(state, n), 1) for n in layers}, state, config)
        answers = {n: torch.einsum("oct,c->o", rows[n].view(len(rows[n]), len(x[n]), -1), x[n]) for n in layers}
    return {canonical_name(layer): float(_vector(len(y), 2) @ y) for layer, y in answers.items()}


def weight_probes(weights: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, float]:
    """One number per layer, `v (W x)` through rows of it: whether its weight is the one that an adapter was trained on.

    Args:
        weights: by canonical name, as for `layer_probes`.
        layers: names, in any spelling.
    """
    names = [name for name in map(canonical_name, layers) if name in weights]
    rows = {name: _rows(weights[name], _ROWS).flatten(1) for name in names}
    return {n: float(_vector(len(w), 2) @ w @ _vector(w.shape[1], 1)) for n, w in rows.items()}


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Of a base: its config and samples of its weights, never a hash of gigabytes.

    `config` has the entries that are numbers, texts, or lists of them. `samples` are `[tensor, shape, dtype, place,
    number]` of 64 tensors; the number is None where a tensor is not in memory or not floating. Which tensors these are
    depends on their names alone, so that others beside them (an IP-Adapter's) change nothing.
    """
    named = _tensors(module)
    chosen = sorted((name for name in named if not any(word in name for word in _NOT_BASE)), key=_hash)[:_SAMPLED]
    samples = []
    for name in chosen:
        tensor = named[name]
        place = _hash(name) % max(1, tensor.numel())
        samples.append([name, list(tensor.shape), _dtype(tensor), place, _number(tensor, place)])
    return {"config": _settings(module), "samples": samples}


def compare(known: Mapping[str, Any], module: nn.Module) -> Same:
    """Whether a fingerprint is that of this base, to the bit, or of the same rounded to half precision or from it.

    Of configs, entries that both have are compared: versions of a library add and drop some. Embeddings may have more
    rows than when it was taken (added tokens). "unknown" where no number can be compared.
    """
    settings, told = _settings(module), known.get("config", {})
    if any((told[key] or None) != (settings[key] or None) for key in told.keys() & settings.keys()):
        return "other"
    named, hidden = _tensors(module), _quantized(module)
    same_dtype, before, here = not hidden, [], []
    for name, shape, dtype, place, value in known["samples"]:
        if name in hidden:
            continue
        tensor = named.get(name)
        if tensor is None or list(tensor.shape[1:]) != shape[1:] or len(tensor.shape) != len(shape):
            return "other"
        if shape and (tensor.shape[0] < shape[0] or (tensor.shape[0] > shape[0] and len(shape) != 2)):
            return "other"
        number = _number(tensor, place)
        if value is None or number is None:
            same_dtype = False
            continue
        same_dtype &= dtype == _dtype(tensor)
        before.append(value)
        here.append(number)
    if not before:
        return "unknown"
    a, b = torch.tensor(before, dtype=torch.float32), torch.tensor(here, dtype=torch.float32)
    if torch.equal(a, b):
        return "equal" if same_dtype else "rounded"
    return "rounded" if _is_rounded(a, b) or _is_rounded(b, a) else "other"


def _is_rounded(a: Tensor, b: Tensor) -> bool:
    """Whether b is a in half precision, all of it rounded in one way; a may be in the other half precision already."""
    ways = ((torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16))
    for way in ways:
        rounded = a
        for half in way:
            rounded = rounded.to(half)
        if torch.equal(rounded.float(), b):
            return True
    is_half, is_bfloat = torch.equal(a, a.half().float()), torch.equal(b, b.bfloat16().float())
    return is_half and is_bfloat and bool(((a - b).abs() <= 2.0**-8 * a.abs() + 2.0**-24).all())


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


def _rows(weight: Tensor, count: int) -> Tensor:
    return weight.detach()[:count].cpu().double()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a state dict has of a component, without what layers quantize.

    No state dict is asked for: bitsandbytes' layers change, by rounding, when they are.
    """
    found: dict[str, Tensor] = {}
    for name, child in unwrap(module).named_modules(remove_duplicate=False):
        own: dict[str, Tensor | None] = dict(child._parameters)
        if quantized_weight(child) is not None:
            del own["weight"]
        else:
            own |= {k: v for k, v in child._buffers.items() if k not in child._non_persistent_buffers_set}
        start = f"{name}." if name else ""
        found |= {canonical_name(normalise_name(start + k)): v for k, v in own.items() if isinstance(v, Tensor)}
    return found


def _quantized(module: nn.Module) -> set[str]:
    """Names of weights that are quantized."""
    named = unwrap(module).named_modules()
    return {f"{canonical_name(normalise_name(n))}.weight" for n, m in named if quantized_weight(m) is not None}


def _settings(module: nn.Module) -> dict[str, Any]:
    config = getattr(unwrap(module), "config", {})
    entries = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in entries.items()
        if not _NOT_SETTINGS.fullmatch(key) and _is_setting(value)
    }


def _is_setting(value: object) -> bool:
    """Whether a config's entry is None, a number, a text, or a list of numbers and texts."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    is_one = (entry is None or isinstance(entry, str | int | float) for entry in entries)
    return all(is_one) and all(math.isfinite(entry) for entry in entries if isinstance(entry, float))


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number(tensor: Tensor, place: int) -> float | None:
    readable = tensor.is_floating_point() and not tensor.is_meta and place < tensor.numel()
    return float(tensor.detach().flatten()[place]) if readable else None


def _vector(features: int, seed: int) -> Tensor:
    """Numbers between -1 and 1 that are the same everywhere: fractional parts of multiples of the golden ratio."""
    steps = torch.arange(1, features + 1, dtype=torch.float64)
    return 2.0 * torch.frac(steps * (0.6180339887498949 * seed) + 0.1 * seed) - 1.0
