"""Adapting a model and undoing it: `inject_oft`, `inject_state`, `remove_oft`, and an adapter's state by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.compiling import reset_compiler
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError, AdapterFileError, ConfigError
from oft_diffusion.hooks import HOOKS, attach, bank_of, detach, unwrap
from oft_diffusion.plan import Adapter, Part, Place, check_adapter_name, layer_of, place_of, site_of
from oft_diffusion.rotation import block_size_of
from oft_diffusion.sharing import SharedInput
from oft_diffusion.targets import (
    Target,
    canonical_name,
    choose_block_size,
    find_layers,
    find_targets,
    output_width,
    projections_of_one_input,
    taps_of,
    tied_projections,
)

KEY_SUFFIX = ".oft_R.weight"  # PEFT's name for the tensor
SCALE_SUFFIX = ".oft_scale.weight"


def inject_oft(
    model: nn.Module,
    config: OFTConfig | None = None,
    adapter_name: str = "default",
    *,
    layers: Iterable[str] | None = None,
    hidden_state: int = -1,
) -> OFTBank:
    """Adapt a model's linear layers, or convolutions, with OFTv2: a pre-hook rotates each target's input.

    The base is frozen (`requires_grad_(False)`) and otherwise untouched: modules, names and state dict stay as they
    are. The new adapter is the identity, trainable, and active after those that are active already.

    Args:
        model: a diffusers or transformers component, or any module.
        config: settings; the defaults if None.
        adapter_name: letters, digits, '-' and '_'.
        layers: names of the layers to adapt, as a file lists them; `config.targets` is only noted down then.
        hidden_state: for a text encoder, the last hidden state that its pipeline takes (`last_hidden_state`): layers
            behind it could not learn, and are left out.

    Returns:
        The component's bank, the same one for every adapter injected. Train `bank.parameters()`; the bank is not
        registered on the model.

    Raises:
        TargetError: no target matches, a layer is not there, projections are fused, or the block size does not divide
            a target.
        AdapterError: the name is taken or not usable.
    """
    config = config or OFTConfig()
    model = unwrap(model)
    check_adapter_name(adapter_name)
    _refuse_untrainable(config)
    if layers is None:
        targets = find_targets(model, config.targets, hidden_state=hidden_state)
    else:
        targets = find_layers(model, layers)
    size = choose_block_size(targets, config.block_size)
    tied = tied_projections(model, targets) if config.share_qkv else {}
    part = Part(adapter_name, size, {t.name: t.in_features // size for t in targets}, tied)
    return _add(model, adapter_name, Adapter(replace(config, block_size=size), (part,)), targets)


def inject_state(
    model: nn.Module, config: OFTConfig, state: Mapping[str, Tensor], adapter_name: str = "default"
) -> OFTBank:
    """Adapt a model by an adapter's tensors: layers, block sizes and places are read off their names and shapes.

    Args:
        model: as for `inject_oft`.
        config: settings; `targets` and `block_size` are only noted down.
        state: `<layer>.oft_R.weight`, `(r, b(b-1)/2)`, and maybe `<layer>.oft_scale.weight`, `(r, b)`: factors of
            rotated outputs. A convolution's r b is its channels, or, in some files of other tools, channels times taps.
        adapter_name: letters, digits, '-' and '_'.

    Returns:
        The component's bank. The new adapter holds the tensors' values, trainable, and is active after the others.

    Raises:
        TargetError: a layer is not there, or projections are fused.
        AdapterFileError: shapes do not fit the layers; nothing is changed then.
        AdapterError: the name is taken or not usable.
    """
    model = unwrap(model)
    check_adapter_name(adapter_name)
    targets = find_layers(model, [key.removesuffix(KEY_SUFFIX) for key in state if key.endswith(KEY_SUFFIX)])
    given = {canonical_name(k.removesuffix(KEY_SUFFIX)): t for k, t in state.items() if k.endswith(KEY_SUFFIX)}
    sizes: dict[int, dict[str, int]] = {}
    problems = []
    for target in targets:
        count, width = given[canonical_name(target.name)].shape
        size = block_size_of(width)
        place = _place(target, config, count * size) if size is not None else None
        if size is None or place is None:
            problems.append(f"{target.name} has shape {(count, width)}, not {_wanted_shape(target, config, size)}")
        else:
            sizes.setdefault(size, {})[site_of(target.name, place)] = count
    if problems:
        raise _mismatch(type(model).__name__, problems, "generators whose blocks fill the axis that they rotate")
    tied = tied_projections(model, targets) if config.share_qkv else {}
    parts = []
    for size, blocks in sizes.items():
        key = adapter_name if len(sizes) == 1 else f"{adapter_name}/{size}"
        parts.append(Part(key, size, blocks, {a: b for a, b in tied.items() if a in blocks and b in blocks}))
    noted = replace(config, block_size=parts[0].block_size if len(parts) == 1 else "mixed")
    bank = _add(model, adapter_name, Adapter(noted, tuple(parts)), targets)
    try:
        load_oft_state_dict(model, state, adapter_name)
    except BaseException:
        remove_oft(model, adapter_name)
        raise
    return bank


def _add(model: nn.Module, name: str, adapter: Adapter, targets: Iterable[Target]) -> OFTBank:
    """Put an adapter into the model's bank, and hooks where there are none yet."""
    bank = bank_of(model) or _new_bank(model)
    bank.refuse_merged(bank.merged)  # x would meet the new one first, and the order of adapters would change
    bank.add_adapter(name, adapter)
    if bank_of(model) is None:
        attach(model, bank)
        model.requires_grad_(False)
    modules = {target.name: target.module for target in targets}
    for site in adapter.blocks:
        if site not in bank.hooks:
            bank.hooks[site] = HOOKS[place_of(site)](bank, site)
            bank.hooks[site].register(modules[layer_of(site)])
    for names in projections_of_one_input(model, targets):
        hooks = [bank.hooks[name] for name in names if name in bank.hooks]  # of inputs: others have marked sites
        if len(hooks) > 1 and not all(hook.shared is not None for hook in hooks):
            SharedInput(hooks)
    bank.activate(name)
    return bank


def _place(target: Target, config: OFTConfig, features: int) -> Place | None:
    """What of a layer has that many features, None where nothing has."""
    module = target.module
    if config.side == "output":
        return "output" if features == output_width(module) else None
    if features == target.in_features:
        return "input"
    return "patches" if features == target.in_features * taps_of(module) else None


def _wanted_shape(target: Target, config: OFTConfig, size: int | None) -> str:
    features = output_width(target.module) if config.side == "output" else target.in_features
    if size is None or features % size:
        return f"one of blocks that divide its {features} features" + (f", as {size} does not" if size else "")
    return str((features // size, size * (size - 1) // 2))


def _refuse_untrainable(config: OFTConfig) -> None:
    if config.side == "output" or config.block_size == "mixed":
        raise ConfigError(
            f"side={config.side!r} with block_size={config.block_size!r} describes a file of another tool",
            expected='side="input" and one block size, for an adapter that is to be trained',
            fix="leave side out, and choose a block size",
        )


def remove_oft(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove one adapter, or all of them with every hook, which leaves the model bit-identical to the base.

    Weights that were merged with `keep_base=False` stay as they are: that is how an adapter is baked in.

    Raises:
        AdapterError: there is no such adapter, or adapters are merged into weights that can be restored.
    """
    bank = require_bank(model)
    if adapter_name is not None:
        bank.delete_adapter(adapter_name)
        if bank.adapters:
            return
    if bank.base_copy is not None:
        bank.refuse_merged(bank.merged)
    model = unwrap(model)
    detach(model)
    _thaw(model, bank.was_trainable)
    reset_compiler()


def _thaw(model: nn.Module, names: frozenset[str]) -> None:
    """Make trainable what injection froze. What came since (an IP-Adapter, a LoRA) stays as it is."""
    here = dict(model.named_parameters())
    if any(".base_layer." in name and name.replace(".base_layer", "") in names for name in here):
        return  # PEFT has wrapped layers since, and has frozen the base for reasons of its own
    for name in names & here.keys():
        here[name].requires_grad_(True)


def require_bank(model: nn.Module) -> OFTBank:
    """The model's bank.

    Raises:
        AdapterError: no adapter was injected.
    """
    bank = bank_of(model)
    if bank is None:
        raise AdapterError(
            f"{type(unwrap(model)).__name__} has no OFT adapter",
            expected="a model that inject_oft or load_oft_weights has adapted",
            fix="inject or load an adapter first",
        )
    return bank


def oft_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names: `<layer>.oft_R.weight`, `(r, b(b-1)/2)` float32, on the CPU.

    Raises:
        AdapterError: there is no such adapter.
    """
    bank = require_bank(model)
    found = {name + KEY_SUFFIX: tensor for name, tensor in bank.effective_generators(adapter_name).items()}
    found |= {name + SCALE_SUFFIX: tensor for name, tensor in bank.output_scales(adapter_name).items()}
    return {key: tensor.cpu().clone() for key, tensor in found.items()}


def load_oft_state_dict(model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Overwrite an injected adapter, in place, by tensors as `oft_state_dict` returns them: a hot swap.

    Names match with or without transformers' optional `text_model.` prefix. Compiled models go on with the new values.

    Raises:
        AdapterError: there is no such adapter, or it is merged.
        AdapterFileError: layers or shapes differ, a tensor is not finite, or layers that share a generator have
            different ones; nothing is changed then.
    """
    bank = require_bank(model)
    adapter = bank.require(adapter_name)
    bank.refuse_merged([adapter_name])
    widths = {site: part.block_size for part in adapter.parts for site in part.blocks}
    blocks = {canonical_name(layer_of(site)): (layer_of(site), n, widths[site]) for site, n in adapter.blocks.items()}
    shapes = {name: (layer, (n, size * (size - 1) // 2)) for name, (layer, n, size) in blocks.items()}
    generators, problems = _match({k: t for k, t in state.items() if not k.endswith(SCALE_SUFFIX)}, shapes, KEY_SUFFIX)
    named = {canonical_name(k.removesuffix(SCALE_SUFFIX)) for k in state if k.endswith(SCALE_SUFFIX)}
    wanted = {name: (layer, (n, size)) for name, (layer, n, size) in blocks.items() if name in named}
    scales, more = _match({k: t for k, t in state.items() if k.endswith(SCALE_SUFFIX)}, wanted, SCALE_SUFFIX)
    if problems or more:
        sizes = ", ".join(str(part.block_size) for part in adapter.parts)
        raise _mismatch(bank.component, problems + more, f"{len(blocks)} tensors of block size {sizes}")
    for site, keeper in adapter.tied.items():
        name, other = layer_of(site), layer_of(keeper)
        if not torch.equal(generators[name], generators[other]):
            raise AdapterFileError(
                f"{name} and {other} of {bank.component} share one generator, and theirs differ here",
                expected="equal tensors for the layers that share_qkv ties",
                fix="load it into an adapter of share_qkv=False",
            )
    bank.swap(adapter_name, generators, scales)


def _match(
    state: Mapping[str, Tensor], wanted: Mapping[str, tuple[str, tuple[int, int]]], suffix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by layer, and what is wrong with them. `wanted`: by canonical name, the layer and its tensor's shape."""
    given = {canonical_name(key.removesuffix(suffix)): (key, tensor) for key, tensor in state.items()}
    problems = [f"{wanted[k][0]} is missing" for k in wanted if k not in given]
    problems += [f"{given[k][0]} matches no layer" for k in given if k not in wanted]
    kept = {key for key, _ in given.values()}
    problems += [f"{key} is there twice, with and without text_model." for key in state if key not in kept]
    for key in wanted.keys() & given.keys():
        (name, shape), tensor = wanted[key], given[key][1]
        if tuple(tensor.shape) != shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
    return {wanted[key][0]: given[key][1] for key in wanted.keys() & given.keys()}, problems


def _mismatch(component: str, problems: list[str], expected: str) -> AdapterFileError:
    return AdapterFileError(
        f"{len(problems)} mismatch(es) with {component}: {'; '.join(sorted(problems)[:3])}"
        + ("; ..." if len(problems) > 3 else ""),
        expected=expected,
        fix="load the adapter onto the architecture and target set it was trained with",
    )


def noted_block_size(state: Mapping[str, Tensor]) -> int | Literal["mixed"]:
    """What a component's settings say of its tensors: their one block size, or "mixed"."""
    sizes = {block_size_of(tensor.shape[1]) for key, tensor in state.items() if key.endswith(KEY_SUFFIX)}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return size or "mixed"


def _new_bank(model: nn.Module) -> OFTBank:
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    dtype = next((p.dtype for p in parameters.values() if p.is_floating_point()), torch.float32)
    bank = OFTBank(type(model).__name__, device, dtype)
    bank.was_trainable = frozenset(name for name, p in parameters.items() if p.requires_grad)
    return bank
