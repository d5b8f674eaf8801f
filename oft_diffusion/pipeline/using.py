"""Which of a pipeline's adapters act, in which order, how strongly, and on which image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import PreTrainedModel

from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError
from oft_diffusion.formats.components import modules_of
from oft_diffusion.hooks import attach_mixing, detach_mixing, unwrap
from oft_diffusion.inject import remove_oft
from oft_diffusion.mixing import Mixture
from oft_diffusion.pipeline.counting import announcing_calls
from oft_diffusion.pipeline.state import Strength, refuse_mixed, refuse_strengths_of_others, require_banks, strength_of
from oft_diffusion.plan import Active, StrengthMode, as_names, make_active

Change = Callable[[str, OFTBank], None]


def set_oft_adapters(
    pipe: DiffusionPipeline,
    adapter_names: str | Sequence[str],
    strengths: Strength | Sequence[Strength] = 1.0,
    mode: StrengthMode | None = None,
) -> None:
    """Choose the adapters that act, in this order, and how strongly; the others stay loaded and rest.

    Args:
        pipe: a pipeline with adapters.
        adapter_names: names, in the order in which a layer's input meets them; empty for the base alone.
        strengths: one for all or one each: 0 is the base, 1 as trained, -1 the inverse (exact Cayley), any number. Or
            one by component, `{"unet": 0.8, "text_encoder": 0.4}`; components that it does not name have 1.
        mode: "rotation" takes the group power R^s, "linear" the blend (1-s) I + s R that other tools use; None is
            "linear" for files of other tools, "rotation" for ours.

    Raises:
        AdapterError: a name is unknown, fused or repeated, counts differ, or a strength is not finite, or a fraction
            that a series adapter's norm does not allow; nothing is changed then.
    """
    names = as_names(adapter_names)
    refuse_mixed(pipe, "other adapters cannot be chosen")
    found = require_banks(pipe, names)
    wanted = {part: _active(names, strengths, mode, part, bank) for part, bank in found.items()}
    _check_components(names, strengths, found)
    for bank in found.values():
        bank.refuse_merged(names)
    _all_or_none(found, lambda part, bank: bank.use(wanted[part]))


def disable_oft_adapters(pipe: DiffusionPipeline, adapter_names: str | Sequence[str] | None = None) -> None:
    """Let active adapters do nothing, all or some; each keeps its place and strength for `enable_oft_adapters`.

    Raises:
        AdapterError: a name is unknown, not active, or fused; nothing is changed then.
    """
    _switch(pipe, adapter_names, enabled=False)


def enable_oft_adapters(pipe: DiffusionPipeline, adapter_names: str | Sequence[str] | None = None) -> None:
    """Let disabled adapters act again, all or some, as strongly as before.

    Raises:
        AdapterError: a name is unknown, not active, or fused; nothing is changed then.
    """
    _switch(pipe, adapter_names, enabled=True)


@contextmanager
def oft_adapters_per_image(
    pipe: DiffusionPipeline,
    adapter_names: Sequence[str | None],
    strengths: float | Sequence[float] = 1.0,
    mode: StrengthMode | None = None,
) -> Iterator[None]:
    """Inside this `with` block, each image of a pipeline call has its own adapter, in one batch.

        with oft_adapters_per_image(pipe, ["mug", "cat", None]):
            images = pipe(["a zwx mug", "a qrs cat", "a mug"]).images

    A row of the denoiser's batch has the adapter of its image, however many times guidance repeats the images. A text
    encoder reads each prompt once; so where an adapter changes it, all images of a prompt must have that adapter.
    Only calls of this pipeline are drawn, not of others with its components, since its arguments tell the images.

    Args:
        pipe: a pipeline with adapters, none of them fused.
        adapter_names: one per image, in the order in which the pipeline returns them; None is the base.
        strengths: one for all or one per image, see `set_oft_adapters`.
        mode: as there.

    Raises:
        AdapterError: a name is unknown, counts differ, an adapter is trainable or fused; and in the pipeline's call, if
            it makes another number of images, or nothing tells whose a row is.
    """
    images = list(adapter_names)
    if isinstance(adapter_names, str) or not images:
        raise AdapterError(
            f"adapter names {adapter_names!r} are not one per image",
            expected="a list with a name, or None for the base, for each image",
            fix='for example ["mug", None]',
        )
    refuse_mixed(pipe, "a second block of adapters per image cannot begin")
    found = require_banks(pipe, [name for name in images if name is not None])
    modules = {part: unwrap(module) for part, module in modules_of(pipe).items() if part in found}
    values = make_active([f"image {i}" for i in range(len(images))], strengths, "rotation")  # for their checks
    try:
        for part, bank in found.items():
            items = tuple(
                Active(name, value.strength, mode or _mode(bank, name))
                if name is not None and name in bank.adapters
                else None
                for name, value in zip(images, values, strict=True)
            )
            bank.mix(Mixture(items, per_prompt=isinstance(modules[part], PreTrainedModel)))
            attach_mixing(modules[part], bank)
        with announcing_calls(pipe, len(images), found.values()):
            yield
    finally:
        for part, bank in found.items():
            detach_mixing(modules[part])
            bank.mix(None)


def unload_oft_weights(pipe: DiffusionPipeline, adapter_name: str | None = None) -> None:
    """Remove one adapter, or all; without any, the pipeline is bit-identical to what it was.

    Pipelines that share components (`from_pipe`) share their adapters, too: they are gone from all. Of one that shares
    only some of them, they are gone from those, and stay in the others.

    Raises:
        AdapterError: there is none of that name, or it is fused and the base was kept: unfuse first. Nothing is
            removed then.
    """
    refuse_mixed(pipe, "nothing can be unloaded")
    found = require_banks(pipe, () if adapter_name is None else (adapter_name,))
    for bank in found.values():
        if adapter_name is not None or bank.base_copy is not None:
            bank.refuse_merged(bank.merged if adapter_name is None else (adapter_name,))
    for part, bank in found.items():
        if adapter_name is None or adapter_name in bank.adapters:
            remove_oft(modules_of(pipe)[part], adapter_name)


def _switch(pipe: DiffusionPipeline, adapter_names: str | Sequence[str] | None, *, enabled: bool) -> None:
    names = None if adapter_names is None else as_names(adapter_names)
    found = require_banks(pipe, names or ())
    for bank in found.values():
        bank.refuse_merged(bank.merged if names is None else names)

    def switch(_: str, bank: OFTBank) -> None:
        for name in [a.name for a in bank.active] if names is None else [n for n in names if n in bank.adapters]:
            bank.enable(name, enabled)

    _all_or_none(found, switch)


def _all_or_none(found: Mapping[str, OFTBank], change: Change) -> None:
    before = [(bank, bank.active, bank.disabled) for bank in found.values()]
    try:
        for part, bank in found.items():
            change(part, bank)
    except AdapterError:
        for bank, active, disabled in before:
            bank.use(active, disabled)
        raise


def _active(
    names: Sequence[str], strengths: Strength | Sequence[Strength], mode: StrengthMode | None, part: str, bank: OFTBank
) -> tuple[Active, ...]:
    """The adapters of one component, with its strengths."""
    listed = isinstance(strengths, Sequence) and not isinstance(strengths, str)
    here = [strength_of(s, part) for s in strengths] if listed else strength_of(strengths, part)  # type: ignore[union-attr, arg-type]
    active = make_active(names, here, mode or "rotation")
    return tuple(Active(a.name, a.strength, mode or _mode(bank, a.name)) for a in active if a.name in bank.adapters)


def _check_components(
    names: Sequence[str], strengths: Strength | Sequence[Strength], found: Mapping[str, OFTBank]
) -> None:
    """Refuse strengths for components that an adapter does not adapt: they would do nothing."""
    each = strengths if isinstance(strengths, Sequence) else [strengths] * len(names)
    for name, strength in zip(names, each, strict=True):
        meant = names if isinstance(strengths, Mapping) else [name]  # one for all: some must adapt it
        here = [part for part, bank in found.items() if any(n in bank.adapters for n in meant)]
        refuse_strengths_of_others(strength, meant, here)


def _mode(bank: OFTBank, name: str) -> StrengthMode:
    note = bank.metadata.get(name)
    return note.mode if note is not None else "rotation"
