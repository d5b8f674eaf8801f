"""What is live in a pipeline, for exports: rotated weights by component, and the note that a file has about them."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime, timezone
from typing import Any

from oft_diffusion.errors import AdapterError
from oft_diffusion.formats.components import modules_of
from oft_diffusion.hooks import bank_of
from oft_diffusion.merge import LiveWeight, live_weights
from oft_diffusion.metadata import public_name, software_versions

EXPORT_KEY = "oft_diffusion_export"  # in a header: what was exported, and how


def live_components(pipe: Any, components: Collection[str] | None = None) -> dict[str, dict[str, LiveWeight]]:
    """`live_weights` by layer of a pipeline's components, or of some of them; those without any are left out.

    Raises:
        AdapterError: it is no pipeline, no adapter acts in it, or in one that is named, or as in `live_weights`.
        TargetError: as there.
    """
    modules = modules_of(pipe)
    wanted = modules if components is None else [part for part in components if part in modules]
    live = {part: {layer.layer: layer for layer in live_weights(modules[part])} for part in wanted}
    if idle := [part for part in components or () if not live.get(part)]:
        raise _nothing_acts(idle[0])
    if not any(live.values()):
        raise _nothing_acts("this pipeline")
    return {part: layers for part, layers in live.items() if layers}


def _nothing_acts(where: str) -> AdapterError:
    return AdapterError(
        f"nothing to export: no adapter acts in {where}",
        expected="active adapters with a strength other than 0",
        fix="load one, or activate one with set_oft_adapters",
    )


def export_note(pipe: Any, carrier: str, live: Collection[str], **more: Any) -> str:
    """A header's text about an export: its kind, the base's name, what is live in these components, the software."""
    name = str(getattr(getattr(pipe, "config", None), "_name_or_path", ""))
    adapters = {
        part: [{"name": a.name, "strength": a.strength, "mode": a.mode} for a in bank.active if a.strength != 0.0]
        for part, module in modules_of(pipe).items()
        if part in live and (bank := bank_of(module)) is not None
    }
    note = {
        "format": carrier,
        "base": public_name(name),
        "adapters": adapters,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "software": software_versions(),
        **more,
    }
    return json.dumps(note, sort_keys=True)
