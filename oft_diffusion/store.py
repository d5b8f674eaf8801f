"""What the adapters of one component are: settings, layout, generators. Which of them act is the bank's business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oft_diffusion import rotation
from oft_diffusion.errors import AdapterError
from oft_diffusion.plan import Adapter, Part, check_adapter_name, layer_of


class AdapterStore(nn.Module):
    """The adapters of a component.

    Attributes:
        component: the component's class name, for messages.
        generators: one float32 parameter per adapter and block size, `(blocks of all its layers, b(b-1)/2)`, zeros at
            the start. Give `bank.parameters()` to the optimizer. No cast of the bank or the component changes their
            dtype.
        scales: by the same keys, factors `(blocks, b)` of rotated outputs, where a file of another tool has them.
        adapters: each adapter's settings and layout.
        metadata: whatever a caller keeps beside an adapter, by name (`pipeline` keeps the file's metadata).
    """

    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component
        self.generators = nn.ParameterDict()
        self.scales: dict[str, Tensor] = {}
        self.adapters: dict[str, Adapter] = {}
        self.metadata: dict[str, Any] = {}

    def store(self, name: str, adapter: Adapter, device: torch.device) -> None:
        """Add an adapter with zero generators, the identity.

        Raises:
            AdapterError: the name is taken or not usable.
        """
        check_adapter_name(name)
        if name in self.adapters:
            raise AdapterError(
                f"adapter {name!r} already exists on {self.component}",
                expected=f"a name other than {', '.join(self.adapters)}",
                fix="choose another adapter_name, or remove this one first",
            )
        self.adapters[name] = adapter
        for part in adapter.parts:
            shape = (part.total_blocks, rotation.packed_size(part.block_size))
            self.generators[part.key] = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def discard(self, name: str) -> None:
        """Forget an adapter that nothing uses any more."""
        for part in self.adapters.pop(name).parts:
            del self.generators[part.key]
            self.scales.pop(part.key, None)
        self.metadata.pop(name, None)

    def require(self, name: str) -> Adapter:
        """The adapter of this name.

        Raises:
            AdapterError: there is none.
        """
        if name not in self.adapters:
            raise AdapterError(
                f"no adapter {name!r} on {self.component}",
                expected=f"one of: {', '.join(self.adapters) or '(none is loaded)'}",
                fix="check the name, or load the adapter first",
            )
        return self.adapters[name]

    def layer_slices(self, name: str) -> dict[str, slice]:
        """Each layer's rows of `generators[name]`, of an adapter with one block size, as those that are trained."""
        (part,) = self.require(name).parts
        return part.slices()

    def effective_generators(self, name: str) -> dict[str, Tensor]:
        """Each layer's generator `(r, b(b-1)/2)` as files hold it, detached: `OFTConfig.scaled` folded in."""
        adapter = self.require(name)
        found: dict[str, Tensor] = {}
        for part in adapter.parts:
            packed = rotation.effective_generator(self.generators[part.key].detach(), adapter.config)
            found.update((layer_of(site), packed[rows]) for site, rows in part.slices().items())
        return {layer_of(site): found[layer_of(site)] for site in adapter.blocks}

    def output_scales(self, name: str) -> dict[str, Tensor]:
        """Each layer's output factors `(r, b)`, for the layers that have any."""
        parts = [part for part in self.require(name).parts if part.key in self.scales]
        return {layer_of(site): self.scales[p.key][rows] for p in parts for site, rows in p.slices().items()}

    @torch.no_grad()
    def write_generators(
        self, name: str, effective: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> None:
        """Overwrite an adapter in place by what `effective_generators` and `output_scales` return.

        Tied layers have equal generators. Deltas that were built before stay as they were.
        """
        adapter = self.require(name)
        for part in adapter.parts:
            layers = [layer_of(site) for site in part.generators]
            flat = torch.cat([effective[layer].detach().to("cpu", torch.float32) for layer in layers])
            if adapter.config.scaled:
                flat = flat * rotation.generator_divisor(flat.shape[-1])
            self.generators[part.key].copy_(flat)
            self._write_scales(part, layers, scales or {})

    def _write_scales(self, part: Part, layers: Sequence[str], scales: Mapping[str, Tensor]) -> None:
        self.scales.pop(part.key, None)
        if any(layer in scales for layer in layers):
            shapes = zip(layers, part.generators.values(), strict=True)
            ones = {layer: torch.ones(count, part.block_size) for layer, count in shapes}
            self.scales[part.key] = torch.cat([scales.get(layer, ones[layer]).float() for layer in layers])

    @torch.no_grad()
    def project_(self) -> None:
        """Apply every adapter's `coft_eps` bound. Call it after each optimiser step."""
        for adapter in self.adapters.values():
            if (bound := adapter.config.coft_eps) is None:
                continue
            for parameter in (self.generators[part.key] for part in adapter.parts):
                scale = rotation.generator_divisor(parameter.shape[-1]) if adapter.config.scaled else 1.0
                rotation.project_frobenius_(parameter, bound * scale)

    @torch.no_grad()
    def orthogonality_error(self, name: str) -> float:
        """Largest entry of |R^T R - I| over all blocks of an adapter at strength 1."""
        adapter = self.require(name)
        packed = [rotation.effective_generator(self.generators[p.key], adapter.config) for p in adapter.parts]
        return max(float(rotation.orthogonality_error(rotation.rotation_delta(p, adapter.config))) for p in packed)
