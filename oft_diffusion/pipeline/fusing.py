"""A pipeline's adapters merged into its weights, and out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from oft_diffusion.bank import OFTBank
from oft_diffusion.base_copy import Kept
from oft_diffusion.errors import AdapterError
from oft_diffusion.merge import KeepBase, check_keep_base, check_merge, merge_oft, put_back, read_base, unmerge_oft
from oft_diffusion.pipeline.state import list_oft_adapters, require_banks
from oft_diffusion.plan import as_names


def fuse_oft(
    pipe: DiffusionPipeline, adapter_names: str | Sequence[str] | None = None, *, keep_base: KeepBase = "cpu"
) -> dict[str, dict[str, float]]:
    """Merge active adapters into the weights: no cost per step any more, and the same pictures up to rounding.

    Of a quantized base, up to what quantizing the rotated weights anew loses, which is returned.

    Args:
        pipe: a pipeline with active adapters.
        adapter_names: which; all active ones if None. They must be the last in order.
        keep_base: where to keep what `unfuse_oft` puts back bit by bit: "cpu", "disk", or False for nowhere.

    Returns:
        By component, what `merge_oft` returns: the error of each layer that is quantized.

    Raises:
        AdapterError: nothing is active, the order would change, a LoRA is fused there, or `keep_base` is none of the
            three, or a disk that is full.
        TargetError: a layer has no weight in memory that can be written, as when it is offloaded to disk.

    After any error nothing is fused, in no component; but for one amid the work (Ctrl-C, no memory) with
    `keep_base=False`: load the pipeline again then.
    """
    check_keep_base(keep_base)
    names = None if adapter_names is None else as_names(adapter_names)
    wanted: dict[str, list[str]] = {}
    for part, bank in require_banks(pipe, names or ()).items():
        here = [a.name for a in bank.active] if names is None else [n for n in names if n in bank.adapters]
        if here:
            wanted[part] = here
    if not wanted:
        fused = [a.name for a in list_oft_adapters(pipe) if a.fused]
        raise AdapterError(
            f"nothing to fuse: no adapter is active or named{f' ({fused[0]} is fused already)' if fused else ''}",
            expected="active adapters",
            fix="activate them with set_oft_adapters first",
        )
    for part, here in wanted.items():
        check_merge(getattr(pipe, part), here)
    done: dict[str, dict[str, float]] = {}
    try:
        for part, here in wanted.items():
            done[part] = merge_oft(getattr(pipe, part), here, keep_base=keep_base)
    except BaseException:  # Ctrl-C, too
        for part in done if keep_base else ():
            unmerge_oft(getattr(pipe, part))
        raise
    return done


def unfuse_oft(pipe: DiffusionPipeline) -> None:
    """Put the base's weights back, bit by bit; fused adapters act live again.

    Raises:
        AdapterError: nothing is fused, the base was not kept or its copy cannot be read, or a LoRA has been fused on
            top, also one that has been unloaded since; nothing is unfused then, in no component.
        TargetError: weights have been offloaded to disk since; likewise.
    """
    fused = [part for part, bank in require_banks(pipe, ()).items() if bank.merged]
    if not fused:
        raise AdapterError("nothing is fused in this pipeline", expected="a fused adapter", fix="call fuse_oft first")
    kept = {part: read_base(getattr(pipe, part)) for part in fused}
    try:
        _put_back(pipe, kept)
    except KeyboardInterrupt:  # amid the work, where nothing else can fail: it is finished first
        _put_back(pipe, kept)
        raise


def _put_back(pipe: DiffusionPipeline, kept: Mapping[str, tuple[OFTBank, Kept]]) -> None:
    for part, (bank, own) in kept.items():
        if bank.merged:
            put_back(getattr(pipe, part), own)
            bank.clear_merged()
