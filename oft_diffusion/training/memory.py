"""Memory of the device that a run uses: how much is free, by how much work makes it grow, and keeping it for reuse."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # mallopt's parameters
_MEGABYTE = 2**20


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have this process keep the memory that it frees meanwhile, where its allocator is glibc's; else nothing.

    A step on a processor frees and asks for the same tensors again and again. glibc gives the large ones back to the
    system each time, which has to clear every page of them anew: 10,000 page faults a step of the pocket recipe.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):  # another system, or musl
        yield
        return
    mallopt(_MMAP, 32 * _MEGABYTE)  # the most that it takes
    mallopt(_TRIM, 2**31 - 1)
    mallopt(_TOP_PAD, 64 * _MEGABYTE)
    try:
        yield
    finally:
        mallopt(_TRIM, 64 * _MEGABYTE)  # where glibc's own adaptation ends
        mallopt(_TOP_PAD, 0)
        trim(0)


class Meter:
    """Looks at a device from now on.

    Attributes:
        free: bytes that were free when this was made, None where the system does not tell (a processor's is Linux's
            MemAvailable; limits of a container are not looked at).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free = _free(device)
        self._resident, self._highest = _process("VmRSS"), _process("VmHWM")

    def growth(self, work: Callable[[], object]) -> int:
        """Bytes by which tensors on the device grow at most while work runs.

        On a GPU its allocator says so. On a processor the storages are counted that operations make and that are alive
        at once, which is the same, and slows the work down. What is saved for backward would be less: under gradient
        checkpointing backward recomputes more than that.
        """
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            return torch.cuda.max_memory_allocated(self.device) - before
        with LiveStorages(self.device.type) as live:
            work()
        return live.most

    def process_growth(self) -> int:
        """Bytes by which this process has grown at most in the processor's memory, with gaps, libraries and all.

        Linux remembers the most that a process ever had; 0 where that was before this was made, and elsewhere.
        """
        highest = _process("VmHWM")
        if self.device.type != "cpu" or highest is None or self._highest is None or self._resident is None:
            return 0
        return highest - self._resident if highest > self._highest else 0


class LiveStorages(TorchDispatchMode):
    """Counts bytes of storages on one kind of device that come to be while this is entered, and are alive.

    Attributes:
        most: bytes, at their most.
        of_memory_alone: `kernels.processor` need not leave its work to torch's operations, to be seen.
    """

    of_memory_alone = True

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.most = 0
        self._bytes: dict[int, int] = {}  # by storage: those of "meta" have no address
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(answer):
            storage = tensor.untyped_storage()
            place = storage._cdata
            # What was given comes back as a view, or written in place, and is nothing new.
            if tensor.device.type == self.device_type and not (place in given or place in self._bytes):
                self._bytes[place] = storage.nbytes()
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._forget, place).atexit = False
        return answer

    def _forget(self, place: int) -> None:
        self._now -= self._bytes.pop(place)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def tensor_bytes(values: Any) -> int:
    """Of all tensors in lists, tuples and dictionaries, however nested."""
    return sum(tensor.nbytes for tensor in _tensors(values))


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _entry("/proc/meminfo", "MemAvailable") if device.type == "cpu" else None


def _process(entry: str) -> int | None:
    return _entry("/proc/self/status", entry)


def _entry(path: str, name: str) -> int | None:
    """Bytes in a line such as `VmRSS:  1234 kB`."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
