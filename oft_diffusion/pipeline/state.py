"""What a pipeline carries: its banks, and its adapters as a user sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError
from oft_diffusion.formats.components import modules_of
from oft_diffusion.hooks import bank_of
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.plan import StrengthMode, layer_of

Strength = float | Mapping[str, float]  # or by component


@dataclass(frozen=True)
class Note:
    """What is kept beside an adapter in each of its banks: where it came from.

    Attributes:
        metadata: its file's.
        format: "oft-diffusion", or whose file it was.
        unmatched: of all components, the file's layers that this pipeline does not have (`strict=False`).
    """

    metadata: AdapterMetadata
    format: str = "oft-diffusion"
    unmatched: tuple[str, ...] = ()

    @property
    def mode(self) -> StrengthMode:
        """How its strength is taken unless something else is asked for: as the tool that it comes from takes it."""
        return self.metadata.mode


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in a pipeline.

    Attributes:
        name: its name here.
        components: the components it adapts.
        strengths: s by component, where it is active or fused.
        mode: how that strength is taken, "rotation" or "linear"; None where it is inactive.
        enabled: whether it acts, at whatever strength.
        fused: whether it is merged into the weights.
        metadata: its file's metadata; None where it was made here.
        format: of its file.
        layers: what it adapts, as "component.layer".
        unmatched: the file's layers that this pipeline does not have.
    """

    name: str
    components: tuple[str, ...]
    strengths: Mapping[str, float]
    mode: StrengthMode | None
    enabled: bool
    fused: bool
    metadata: AdapterMetadata | None
    format: str
    layers: tuple[str, ...]
    unmatched: tuple[str, ...]

    @property
    def matched(self) -> int:
        """How many layers it adapts."""
        return len(self.layers)

    @property
    def strength(self) -> float | None:
        """The strength in all its components; None where it is inactive, or where they have different ones."""
        values = set(self.strengths.values())
        return values.pop() if len(values) == 1 else None


def strength_of(strength: Strength, part: str) -> float:
    """A component's; 1 where only others have one."""
    return strength.get(part, 1.0) if isinstance(strength, Mapping) else strength


def refuse_strengths_of_others(strength: Strength, names: Sequence[str], parts: Sequence[str]) -> None:
    """Refuse strengths for components that adapters do not adapt: they would do nothing.

    Raises:
        AdapterError: there is one.
    """
    if isinstance(strength, Mapping) and (unknown := [part for part in strength if part not in parts]):
        raise AdapterError(
            f"there is a strength for {unknown[0]!r}, which {', '.join(map(repr, names))} does not adapt",
            expected=f"strengths for {', '.join(parts)}",
            fix="leave that component out",
        )


def list_oft_adapters(pipe: DiffusionPipeline) -> list[LoadedAdapter]:
    """The pipeline's adapters, in the order they were loaded into each component."""
    found = banks(pipe)
    order: list[str] = []
    for bank in found.values():
        place = 0
        for name in bank.adapters:
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
    return [_listed(name, {part: bank for part, bank in found.items() if name in bank.adapters}) for name in order]


def _listed(name: str, here: Mapping[str, OFTBank]) -> LoadedAdapter:
    used = {
        part: item for part, bank in here.items() for item in (*bank.chosen, *bank.merged_active) if item.name == name
    }
    note = next((bank.metadata[name] for bank in here.values() if name in bank.metadata), None)
    return LoadedAdapter(
        name,
        tuple(here),
        {part: item.strength for part, item in used.items()},
        next((item.mode for item in used.values()), None),
        bool(used) and not any(name in bank.disabled for bank in here.values()),
        any(name in bank.merged for bank in here.values()),
        note.metadata if note else None,
        note.format if note else "oft-diffusion",
        tuple(f"{part}.{layer_of(site)}" for part, bank in here.items() for site in bank.adapters[name].blocks),
        note.unmatched if note else (),
    )


def banks(pipe: DiffusionPipeline) -> dict[str, OFTBank]:
    """The banks of the components that carry adapters."""
    return {part: bank for part, module in modules_of(pipe).items() if (bank := bank_of(module)) is not None}


def require_banks(pipe: DiffusionPipeline, names: Sequence[str]) -> dict[str, OFTBank]:
    """The pipeline's banks, all of them.

    Raises:
        AdapterError: there is none, or none with an adapter of one of these names.
    """
    found = banks(pipe)
    known = [a.name for a in list_oft_adapters(pipe)]
    for name in names:
        if name not in known:
            raise AdapterError(
                f"no adapter {name!r} in this pipeline",
                expected=f"one of: {', '.join(known) or '(none is loaded)'}",
                fix="check the name, or load it with load_oft_weights",
            )
    if not found:
        raise AdapterError(
            "this pipeline has no OFT adapter", expected="a loaded adapter", fix="call load_oft_weights first"
        )
    return found


def refuse_mixed(pipe: DiffusionPipeline, what: str) -> None:
    """Raise inside `oft_adapters_per_image`, where each image's adapter is settled.

    Raises:
        AdapterError: the pipeline is in such a block.
    """
    if any(bank.images for bank in banks(pipe).values()):
        raise AdapterError(
            f"{what} while the adapters of this pipeline are given image by image",
            expected="a pipeline outside oft_adapters_per_image",
            fix="leave the `with` block first",
        )
