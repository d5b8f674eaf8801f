"""Adapting a model and undoing it: `inject_oft`, `remove_oft`, and the adapter's state by layer name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError, AdapterFileError
from oft_diffusion.hooks import LayerHook, attach, bank_of, detach, reset_compiler, unwrap
from oft_diffusion.plan import Adapter, check_adapter_name
from oft_diffusion.rotation import block_size_of
from oft_diffusion.targets import canonical_name, choose_block_size, find_layers, find_targets, tied_projections

KEY_SUFFIX = ".oft_R.weight"  # PEFT's name for the tensor


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
    if layers is None:
        targets = find_targets(model, config.targets, hidden_state=hidden_state)
    else:
        targets = find_layers(model, layers)
    block_size = choose_block_size(targets, config.block_size)
    bank = bank_of(model) or _new_bank(model)
    adapter = Adapter(
        replace(config, block_size=block_size),
        block_size,
        {t.name: t.in_features // block_size for t in targets},
        tied_projections(model, targets) if config.share_qkv else {},
    )
    bank.refuse_merged(bank.merged)  # x would meet the new one first, and the order of adapters would change
    bank.add_adapter(adapter_name, adapter)
    if bank_of(model) is None:
        attach(model, bank)
        model.requires_grad_(False)
    for target in targets:
        if target.name not in bank.hooks:
            bank.hooks[target.name] = LayerHook(bank, target.name)
            target.module.register_forward_pre_hook(bank.hooks[target.name])
    bank.activate(adapter_name)
    return bank


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
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in bank.was_trainable)
    reset_compiler()


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
    generators = require_bank(model).effective_generators(adapter_name)
    return {name + KEY_SUFFIX: tensor.cpu().clone() for name, tensor in generators.items()}


def load_oft_state_dict(model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Overwrite an injected adapter's generators, in place, from tensors as `oft_state_dict` returns them.

    Names match with or without transformers' optional `text_model.` prefix.

    Raises:
        AdapterError: there is no such adapter, or it is merged.
        AdapterFileError: layers or shapes differ, a tensor is not finite, or layers that share a generator have
            different ones; nothing is changed then.
    """
    bank = require_bank(model)
    adapter = bank.require(adapter_name)
    bank.refuse_merged([adapter_name])
    width = bank.generators[adapter_name].shape[-1]
    wanted = {canonical_name(name): (name, (count, width)) for name, count in adapter.blocks.items()}
    given = {canonical_name(key.removesuffix(KEY_SUFFIX)): (key, tensor) for key, tensor in state.items()}
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
    if problems:
        raise AdapterFileError(
            f"{len(problems)} mismatch(es) with {bank.component}: {'; '.join(sorted(problems)[:3])}"
            + ("; ..." if len(problems) > 3 else ""),
            expected=f"{len(wanted)} tensors of {width} columns (block size {block_size_of(width)})",
            fix="load the adapter onto the architecture and target set it was trained with",
        )
    generators = {wanted[k][0]: given[k][1] for k in wanted}
    for name, keeper in adapter.tied.items():
        if not torch.equal(generators[name], generators[keeper]):
            raise AdapterFileError(
                f"{name} and {keeper} of {bank.component} share one generator, and theirs differ here",
                expected="equal tensors for the layers that share_qkv ties",
                fix="load it into an adapter of share_qkv=False",
            )
    bank.write_generators(adapter_name, generators)


def _new_bank(model: nn.Module) -> OFTBank:
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    dtype = next((p.dtype for p in parameters.values() if p.is_floating_point()), torch.float32)
    bank = OFTBank(type(model).__name__, device, dtype)
    bank.was_trainable = frozenset(name for name, p in parameters.items() if p.requires_grad)
    return bank
