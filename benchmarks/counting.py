"""What does not wobble: operations of a call, and bytes that its forward keeps for backward."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# Views, allocations and bookkeeping: no pass over any data of their own. What a copy does is counted as `copy_`.
NOT_WORK = {
    f"aten::{name}"
    for name in (
        "view", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach",
        "alias", "t", "as_strided", "split", "chunk", "unbind", "_unsafe_view", "narrow", "split_with_sizes",
        "_reshape_alias", "numpy_T", "expand_as", "view_as", "unsafe_split", "lift_fresh", "resolve_conj",
        "resolve_neg", "is_nonzero", "item", "_local_scalar_dense", "result_type", "empty", "empty_like",
        "empty_strided", "new_empty", "to", "_to_copy", "contiguous", "clone",
    )
}  # fmt: skip


def leaf_operations(call: Callable[[], object]) -> int:
    """ATen operations of a call that call no others, those inside custom operators included.

    So nothing hides inside one op: a product per block counts as so many products.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    with_copies = NOT_WORK | {"aten::copy_"}
    return sum(
        _is(event, NOT_WORK) and not any(_is(child, with_copies) for child in event.cpu_children)
        for event in profiler.events()
    )


def python_calls(call: Callable[[], object]) -> int:
    """Python functions that a call enters in its thread: in a model each costs microseconds."""
    entered = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal entered
        entered += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


def _is(event: FunctionEvent, apart_from: set[str]) -> bool:
    """Whether an event is an ATen operation, and none of these."""
    return event.name.startswith("aten::") and event.name not in apart_from


class _Kept:
    """A tensor for as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output would hold its own node, and that this


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that a forward keeps for its backward, each once, those of parameters aside.

    What a part of the graph keeps that is gone with it before the forward's end, of a detached result, is not counted.
    """
    known = {parameter.untyped_storage()._cdata for parameter in parameters}  # of tensors without numbers, too
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        one = _Kept(tensor)
        kept.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        result = forward()
    storages = {one.tensor.untyped_storage()._cdata: one.tensor.untyped_storage() for one in kept}
    del result
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes that a call allocates on the processor at most at once, beyond what was there before."""
    now = most = 0
    for change in _changes(call):
        now += change
        most = max(most, now)
    return most


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest piece of memory that a call allocates on the processor."""
    return max(_changes(call), default=0)


def _changes(call: Callable[[], object]) -> list[int]:
    """Bytes that a call allocates (and, below zero, frees), in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler
    assert results is not None
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


def kernels_of(call: Callable[[], object]) -> tuple[int, float]:
    """Kernels that a call starts on a CUDA card, and seconds for which the card runs them, copies included."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    on_card = sum(event.device_time for event in events if event.device_type.name == "CUDA")
    return sum("LaunchKernel" in event.name for event in events), on_card / 1e6
