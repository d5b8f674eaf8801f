"""The rotations and their Cayley transform on a processor, float32: what `processor.c` computes.

The products are small, and torch's cost more to call than to compute. The machine's own compiler makes a library of the
C at first use (seconds) and keeps it in the user's cache; where there is none, or it fails, the pure-torch forms serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from oft_diffusion.kernels.processor_graph import Rebuilt

_log = logging.getLogger(__name__)
SIZES = (8, 16, 32, 64, 128)  # of blocks
_SOURCE = Path(__file__).with_suffix(".c")
_HEADERS = [_SOURCE.with_name(f"processor_{name}.h") for name in ("products", "cayley")]
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_PLAIN = (Tensor, nn.Parameter)  # with memory of their own
# What is called for every layer runs cold in a model, where each name that is looked up in another module, and each
# Python function, costs microseconds: hence these, and conditions that stand in one.
_address, _contiguous, _empty_like, _float32 = Tensor.data_ptr, Tensor.contiguous, torch.empty_like, torch.float32
_forward_ad = torch.autograd.forward_ad
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
_traced = torch._C._get_tracing_state
MOST_LAYERS = 16  # of one input
_POINTERS = [struct.Struct(f"{count}P") for count in range(MOST_LAYERS + 1)]  # by how many there are
_CALLS = [struct.Struct(f"{11 + count}q") for count in range(MOST_LAYERS + 1)]  # likewise: `struct call` of the C

_pointer, _long, _int, _packed = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p
_SIGNATURES = {
    "oft_rotate": (_packed, _packed),
    "oft_backward": (_packed, _packed, _packed),
    "oft_build": (_pointer, _pointer, _long, _int, _int),
    "oft_unbuild": (_pointer, _pointer, _pointer, _long, _int, _int),
}


def fits(x: Tensor, size: int) -> bool:
    """Whether x can be rotated here by blocks of that size, or blocks be built here of generators like x.

    It cannot where something looks at torch's operations, to trace, transform or count them, and would not see these.
    """
    return (
        type(x) in _PLAIN and x.dtype is _float32 and x.is_cpu and size in SIZES and library() is not None
        and not (_modes() and is_seen_by_modes()) and not _transforms() and _traced() is None
        and _forward_ad._current_level < 0
    )  # fmt: skip


def fits_gradients(x: Tensor, grads: Sequence[Tensor]) -> bool:
    """Whether these are of what x, which `fits`, was rotated to."""
    return all(type(g) in _PLAIN and g.shape == x.shape and g.dtype == x.dtype and g.is_cpu for g in grads)


def takes(deltas: Sequence[Tensor]) -> bool:
    """Whether one input can be rotated here by all of these at once."""
    first = deltas[0]
    same = all(delta.shape == first.shape and delta.dtype == first.dtype and delta.is_cpu for delta in deltas)
    return same and first.dim() == 3 and len(deltas) <= MOST_LAYERS and fits(first, first.shape[-1])


def derived_by_torch(x: Tensor, size: int, grads: Sequence[Tensor]) -> bool:
    """Whether a backward is to be torch's own operations: it is to be derived once more, or something watches.

    Args:
        x: what was rotated.
        size: of the blocks.
        grads: what the backward is given: of several vectors at once, each is a batch in disguise.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or not fits(x, size) or any(map(batched, grads))


def is_seen_by_modes() -> bool:
    """Whether a mode wants to see operations. One that says `of_memory_alone` sees what is allocated for C."""
    return not all(getattr(mode, "of_memory_alone", False) for mode in _get_current_dispatch_mode_stack())


class Flat:
    """All deltas of a component, `(blocks, b, b)`, or their generators, `(blocks, b(b-1)/2)`: plans tell places in it.

    Attributes:
        tensor: another one in every forward, contiguous, float32, in the graph where there is one; None between them.
        address: where it lies, in bytes.
        source: what has it again in the backward; None without grad.
        modes: of `torch.is_grad_enabled()`, in which it is to be rotated by now.
    """

    def __init__(self, *modes: bool) -> None:
        self.tensor: Tensor | None = None
        self.address = 0
        self.source: Rebuilt | None = None
        self.modes: tuple[bool, ...] = modes

    def hold(self, tensor: Tensor, source: Rebuilt | None) -> None:
        """Be that tensor from now on: with grad where there is a source, else without."""
        self.tensor, self.address, self.source, self.modes = tensor, tensor.data_ptr(), source, (source is not None,)

    def drop(self) -> None:
        """Hold nothing."""
        self.tensor, self.address, self.source, self.modes = None, 0, None, ()


_FIXED = Flat()  # of plans for deltas of their own, which are to be used at once


class Plan(NamedTuple):
    """What can be known of the rotations of one input before it comes."""

    flat: Flat
    offsets: bytes  # of what each layer has, from its address
    layers: int
    blocks: int
    size: int
    width: int
    in_place: bool = False  # generators are given, and deltas built where they are used
    starts: tuple[int, ...] = ()  # at which of its blocks each layer's begin
    deltas: tuple[Tensor, ...] = ()  # those of a fixed plan
    rows: tuple[Tensor, ...] = ()  # the same, as C reads them


def plan_for(deltas: Sequence[Tensor], flat: Flat = _FIXED) -> Plan:
    """Prepare the rotations of one input.

    Args:
        deltas: `(r, b, b)` each, as `takes` takes them.
        flat: holds nothing, and tells in which grad modes the plan is of use.
    """
    rows = (*map(_contiguous, deltas),)
    blocks, size, _ = rows[0].shape
    offsets = _POINTERS[len(rows)].pack(*map(_address, rows))
    return Plan(flat, offsets, len(rows), blocks, size, blocks * size, False, (), (*deltas,), rows)


def plan_in(flat: Flat, starts: Sequence[int], blocks: int, size: int, *, of_generators: bool) -> Plan:
    """Prepare the rotations of one input for all forwards.

    Args:
        flat: that will hold what each has.
        starts: at which of its blocks each layer's begin.
        blocks: how many each has.
        size: b.
        of_generators: whether flat will hold generators. Deltas are then built for each rotation anew, and never leave
            the cache; all of a component's at once have to be written to memory and read from there.
    """
    offsets = offsets_of(starts, size * (size - 1) // 2 if of_generators else size * size)
    return Plan(flat, offsets, len(starts), blocks, size, blocks * size, of_generators, (*starts,))


def offsets_of(starts: Sequence[int], each: int) -> bytes:
    """As a plan has them, of blocks of so many numbers."""
    return _POINTERS[len(starts)].pack(*(4 * each * start for start in starts))


def rotate(x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """`x + x blockdiag(D)` for each D.

    Args:
        x: `(..., r * b)`, which `fits`; read where it lies, where its rows are equally far apart.
        plan: of the deltas.

    Returns:
        x's shape each, contiguous.
    """
    flat, offsets, count, blocks, size, stride, in_place, *_ = plan
    if not x.is_contiguous():
        x, stride = _in_rows(x)
    made = (*map(_empty_like, (x,) * count),)
    # One pack: every argument of a call would be converted by code that is not in the cache.
    call = _CALLS[count].pack(
        x.data_ptr(), stride, flat.address, 0, 0, x.numel(), blocks, count, torch.get_num_threads(), size, in_place,
        *map(_address, made),
    )  # fmt: skip
    _library().oft_rotate(call, offsets)
    return made


def gradients(
    x: Tensor, deltas: Sequence[Tensor], grads: Sequence[Tensor], *, of_x: bool = True, of_deltas: bool = True
) -> tuple[Tensor | None, list[Tensor] | None]:
    """dx, the sum of `g + g blockdiag(D)^T` over the layers, and every dD; what is not asked for is None.

    Args:
        x: as `rotate` takes it.
        deltas: as `plan_for` takes them.
        grads: of what `rotate` returned, x's shape and dtype.
        of_x: whether dx is asked for.
        of_deltas: whether every dD is. A sum over rows does not depend on the number of threads.
    """
    plan = plan_for(deltas)
    ddeltas = [*map(_empty_like, plan.rows)] if of_deltas else None
    at = None if ddeltas is None else _POINTERS[len(ddeltas)].pack(*map(_address, ddeltas))
    return rotate_back(x, plan, 0, grads, at, of_x=of_x), ddeltas


def rotate_back(
    x: Tensor,
    plan: Plan,
    address: int,
    grads: Sequence[Tensor],
    found_offsets: bytes | None,
    found_address: int = 0,
    *,
    of_x: bool,
) -> Tensor | None:
    """What `gradients` gives, the deltas' own written where the caller says.

    Args:
        x: as `rotate` takes it.
        plan: by which it was rotated.
        address: what the plan's offsets are from.
        grads: as `gradients` takes them.
        found_offsets: where every dD is to be written, or, of a plan for generators, their gradients; None where they
            are not asked for.
        found_address: what these are from.
        of_x: whether dx is asked for.

    Returns:
        dx, x's shape, contiguous, or None.
    """
    _, offsets, count, blocks, size, stride, in_place, *_ = plan
    if not x.is_contiguous():
        x, stride = _in_rows(x)
    dx = _empty_like(x) if of_x else None
    grads = [*map(_contiguous, grads)]
    call = _CALLS[count].pack(
        x.data_ptr(), stride, address, 0 if dx is None else dx.data_ptr(), found_address, x.numel(), blocks, count,
        torch.get_num_threads(), size, in_place, *map(_address, grads),
    )  # fmt: skip
    _library().oft_backward(call, offsets, found_offsets)
    return dx


def cayley_delta(packed: Tensor, size: int) -> Tensor:
    """`D = R - I`, `(r, b, b)`, of generators `(r, b(b-1)/2)`, exact at any norm: `2 (I - Q)^-1 Q`."""
    packed = packed.contiguous()
    delta = packed.new_empty(len(packed), size, size)
    _library().oft_build(packed.data_ptr(), delta.data_ptr(), len(packed), torch.get_num_threads(), size)
    return delta


def cayley_grad(delta: Tensor, grad: Tensor) -> Tensor:
    """The gradient of generators, `(r, b(b-1)/2)`, of D's: `rotation._CayleyDelta`, packed."""
    grad, delta, size = grad.contiguous(), delta.contiguous(), delta.shape[-1]
    packed = delta.new_empty(len(delta), size * (size - 1) // 2)
    _library().oft_unbuild(
        delta.data_ptr(), grad.data_ptr(), packed.data_ptr(), len(delta), torch.get_num_threads(), size
    )
    return packed


def _in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy where its rows are not equally far apart; and how many numbers that is.

    Of either `empty_like` makes what is contiguous.
    """
    width = x.shape[-1]
    if x.stride(-1) == 1:
        axes = [(n, stride) for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        step = expected = axes[-1][1] if axes else width
        for n, stride in reversed(axes):
            if stride != expected:
                break
            expected *= n
        else:
            if step >= width:
                return x, step
    return x.contiguous(), width


# -- the library -------------------------------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL | None:
    """What the C has been compiled to; None where that cannot be, or `OFT_DIFFUSION_KERNELS=0` is set."""
    return None if os.environ.get("OFT_DIFFUSION_KERNELS") == "0" else _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    """The library; None on other systems than Linux, without gcc, and where something fails, which the log tells."""
    compiler = os.environ.get("CC") or shutil.which("gcc")
    if platform.system() != "Linux" or not compiler or not _has_gnu_openmp():
        return None
    try:
        found = ctypes.CDLL(str(_compiled(compiler.split())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        told = getattr(error, "stderr", None) or b""
        _log.info("rotations are left to torch: %s %s", error, told.decode(errors="replace"))
        return None
    for name, types in _SIGNATURES.items():
        getattr(found, name).argtypes = types
        getattr(found, name).restype = None
    return found


def _has_gnu_openmp() -> bool:
    """Whether torch runs on the library that gcc's code would load: two would each keep threads, on the same cores."""
    return "/libgomp.so.1\n" in Path("/proc/self/maps").read_text()


_library: Callable[[], ctypes.CDLL] = library  # type: ignore[assignment]  # where something fits, there is one


def _compiled(compiler: Sequence[str]) -> Path:
    """The library's file, made where there is none yet for this text, this compiler and this processor.

    Raises:
        OSError: nowhere to write, or no such compiler, or not gcc.
        SubprocessError: the compiler refuses.
    """
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    if b"Free Software Foundation" not in version:  # clang's OpenMP would be another than torch's
        raise OSError(f"{compiler[0]} is not gcc")
    texts = [path.read_bytes() for path in (_SOURCE, *_HEADERS)]
    known = b"\0".join([*texts, version, " ".join(_FLAGS).encode(), _processor().encode()])
    made = _cache() / f"processor-{hashlib.sha256(known).hexdigest()[:16]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            out = Path(folder) / made.name
            subprocess.run(
                [*compiler, *_FLAGS, str(_SOURCE), "-o", str(out)], check=True, capture_output=True, timeout=300
            )
            out.chmod(0o700)
            out.replace(made)
    return made


def _cache() -> Path:
    """A folder of the user's own: what lies in it is run.

    Raises:
        OSError: it cannot be made, or others may write into it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "oft_diffusion"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _processor() -> str:
    """What `-march=native` means: a home may be shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
