"""The rotations and their Cayley transform on a processor, float32: what `processor.c` computes.

The products are small, and torch's cost more to call than to compute. The machine's own compiler makes a library of the
C at first use (seconds) and keeps it in the user's cache; where there is none, or it fails, the pure-torch forms serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import operator
import os
import platform
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Sequence
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
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_PLAIN = (Tensor, nn.Parameter)  # with memory of their own
_address, _contiguous = Tensor.data_ptr, Tensor.contiguous
_requires_grad = operator.attrgetter("requires_grad")
_POINTERS = [struct.Struct(f"{count}P") for count in range(17)]  # by how many there are
_PER_THREAD = 2**17  # multiplications, below which another thread costs more than it saves

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_addresses, _sizes = ctypes.c_char_p, (_long, _long, _int, _int, _int)
_SIGNATURES = {
    "oft_rotate": (_pointer, _long, _addresses, _addresses, *_sizes),
    "oft_backward": (_pointer, _long, _addresses, _addresses, _pointer, _addresses, *_sizes),
    "oft_build": (_pointer, _pointer, _long, ctypes.c_float, _int, _int),
    "oft_unbuild": (_pointer, _pointer, _pointer, _long, _int, _int),
}


def fits(x: Tensor, size: int) -> bool:
    """Whether x can be rotated here by blocks of that size, or blocks be built here of generators like x."""
    plain = type(x) in _PLAIN and x.dtype == torch.float32 and x.is_cpu
    return plain and size in SIZES and library() is not None and not _is_watched()


def fits_gradients(x: Tensor, grads: Sequence[Tensor]) -> bool:
    """Whether these are of what x, which `fits`, was rotated to."""
    return all(type(g) in _PLAIN and g.shape == x.shape and g.dtype == x.dtype and g.is_cpu for g in grads)


def takes(deltas: Sequence[Tensor]) -> bool:
    """Whether one input can be rotated here by all of these at once."""
    first = deltas[0]
    same = all(delta.shape == first.shape and delta.dtype == first.dtype and delta.is_cpu for delta in deltas)
    return same and first.dim() == 3 and len(deltas) < len(_POINTERS) and fits(first, first.shape[-1])


def _is_watched(*grads: Tensor) -> bool:
    """Whether something looks at torch's operations, to trace, transform or count them, and would not see these.

    A mode that says `of_memory_alone` sees what is allocated for C.

    Args:
        grads: what a backward is given: of several vectors at once, each is a batch in disguise.
    """
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else ()
    if torch._C._are_functorch_transforms_active() or not all(getattr(m, "of_memory_alone", False) for m in modes):
        return True
    if torch._C._get_tracing_state() is not None or torch.autograd.forward_ad._current_level >= 0:
        return True
    return any(map(torch._C._functorch.is_legacy_batchedtensor, grads))


def derived_by_torch(*grads: Tensor) -> bool:
    """Whether a backward is to be torch's own operations: it is to be derived once more, or something watches."""
    return torch.is_grad_enabled() or _is_watched(*grads)


class Plan(NamedTuple):
    """What can be known of deltas before the input comes: `plan_for`."""

    deltas: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]  # the same, as C reads them
    addresses: bytes
    blocks: int
    size: int
    width: int
    requires_grad: bool
    source: Rebuilt | None = None
    flat: Tensor | None = None  # the source's, of which the deltas are parts
    starts: tuple[int, ...] = ()  # at which of its blocks they begin


def plan_for(deltas: Sequence[Tensor], source: Rebuilt | None = None, flat: Tensor | None = None) -> Plan:
    """Prepare the rotations of one input.

    Args:
        deltas: `(r, b, b)` each, as `takes` takes them.
        source: what builds them again in the backward; None where the graph is to keep them.
        flat: the source's deltas `(blocks, b, b)`, contiguous, of which these are parts.
    """
    rows = (*map(_contiguous, deltas),)
    blocks, size, _ = rows[0].shape
    addresses = _POINTERS[len(rows)].pack(*map(_address, rows))
    begins = None if flat is None else flat.storage_offset()
    starts = () if begins is None else (*((delta.storage_offset() - begins) // size**2 for delta in deltas),)
    requires_grad = any(map(_requires_grad, deltas))
    return Plan((*deltas,), rows, addresses, blocks, size, blocks * size, requires_grad, source, flat, starts)


# In a model these two run cold, where each call of a Python function costs microseconds: hence so few.


def rotate(x: Tensor, plan: Plan) -> list[Tensor]:
    """`x + x blockdiag(D)` for each D.

    Args:
        x: `(..., r * b)`, which `fits`; read where it lies, where its rows are equally far apart.
        plan: of the deltas.

    Returns:
        x's shape each, contiguous.
    """
    stride = plan.width
    if not x.is_contiguous():
        x, stride = _in_rows(x)
    shape, count = x.shape, len(plan.rows)
    made = [*map(x.new_empty, [shape] * count)]
    if numbers := x.numel():
        threads = min(torch.get_num_threads(), numbers * plan.size * count // _PER_THREAD) or 1
        _library().oft_rotate(
            x.data_ptr(), stride, plan.addresses, _POINTERS[count].pack(*map(_address, made)),
            numbers // plan.width, plan.blocks, count, threads, plan.size,
        )  # fmt: skip
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
    deltas = [*map(_contiguous, deltas)]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None
    ddeltas = [*map(torch.empty_like, deltas)] if of_deltas else None
    blocks, size, _ = deltas[0].shape
    into = None if ddeltas is None else [*map(_address, ddeltas)]
    rotate_back(x, [*map(_address, deltas)], grads, dx, into, blocks, size)
    return dx, ddeltas


def rotate_back(
    x: Tensor,
    deltas: Sequence[int],
    grads: Sequence[Tensor],
    dx: Tensor | None,
    ddeltas: Sequence[int] | None,
    blocks: int,
    size: int,
) -> None:
    """Write what `gradients` gives.

    Args:
        x: as `rotate` takes it.
        deltas: addresses of deltas.
        grads: as `gradients` takes them.
        dx: where it is to be written, contiguous; None where it is not asked for.
        ddeltas: addresses where they are to be written; None where they are not asked for.
        blocks: r.
        size: b.
    """
    stride = x.shape[-1]
    if not x.is_contiguous():
        x, stride = _in_rows(x)
    grads = [*map(_contiguous, grads)]
    numbers, count = x.numel(), len(grads)
    pack = _POINTERS[count].pack
    threads = min(torch.get_num_threads(), numbers * size * count // _PER_THREAD) or 1
    _library().oft_backward(
        x.data_ptr(), stride, pack(*deltas), pack(*map(_address, grads)),
        None if dx is None else dx.data_ptr(), None if ddeltas is None else pack(*ddeltas),
        numbers // max(1, blocks * size), blocks, count, threads, size,
    )  # fmt: skip


def cayley_delta(packed: Tensor, size: int) -> Tensor:
    """`D = R - I`, `(r, b, b)`, of generators `(r, b(b-1)/2)`, exact at any norm.

    As `rotation._by_doubling`, the series is carried on until what is left out is below rounding; of generators too
    large for that, an inverse serves.
    """
    packed = packed.contiguous()
    delta = packed.new_empty(len(packed), size, size)
    _library().oft_build(
        packed.data_ptr(), delta.data_ptr(), len(packed), torch.finfo(torch.float32).eps,
        _threads(len(packed), size, 4), size,
    )  # fmt: skip
    return delta


def cayley_grad(delta: Tensor, grad: Tensor) -> Tensor:
    """The gradient of generators, `(r, b(b-1)/2)`, of D's: `rotation._CayleyDelta`, packed."""
    grad, delta, size = grad.contiguous(), delta.contiguous(), delta.shape[-1]
    packed = delta.new_empty(len(delta), size * (size - 1) // 2)
    _library().oft_unbuild(
        delta.data_ptr(), grad.data_ptr(), packed.data_ptr(), len(delta), _threads(len(delta), size, 2), size
    )
    return packed


def _in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy where its rows are not equally far apart; and how many numbers that is."""
    width = x.shape[-1]
    if x.dim() > 1 and x.stride(-1) == 1:
        step = x.stride(-2)
        apart = [step]
        for length in reversed(x.shape[1:-1]):
            apart.append(apart[-1] * length)
        if step >= width and list(x.stride()[:-1]) == apart[::-1]:
            return x, step
    return x.contiguous(), width


def _threads(blocks: int, size: int, products: int) -> int:
    """As many as so many products of b x b are worth."""
    return min(torch.get_num_threads(), products * blocks * size**3 // _PER_THREAD) or 1


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


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def _compiled(compiler: Sequence[str]) -> Path:
    """The library's file, made where there is none yet for this text, this compiler and this processor.

    Raises:
        OSError: nowhere to write, or no such compiler, or not gcc.
        SubprocessError: the compiler refuses.
    """
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    if b"Free Software Foundation" not in version:  # clang's OpenMP would be another than torch's
        raise OSError(f"{compiler[0]} is not gcc")
    known = b"\0".join([_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor().encode()])
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
