"""The library that C becomes: compiled once, for this machine, and what a machine without a compiler gets."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oft_diffusion import rotation
from oft_diffusion.kernels import processor
from tests.core import rotate_cases as cases
from tests.core.reference import random_packed, relative
from tests.core.test_processor import BLOCKS, derivatives, each, needs_kernels


def asked(environment: dict[str, str]) -> str:
    """Whether a new process has the library, and what it makes of a rotation either way."""
    code = (
        "import torch; from oft_diffusion.kernels import block_rotate, processor; x, d = torch.ones(2, 8), "
        "torch.ones(1, 8, 8); print(processor.library() is not None, block_rotate(x, d).sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert not run.stderr
    return run.stdout.strip()


@needs_kernels
def test_the_library_is_compiled_once_and_without_it_torch_does(tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert asked(cache) == "True 144.0"
    [made] = (tmp_path / "oft_diffusion").iterdir()
    assert not stat.S_IMODE(made.parent.stat().st_mode) & 0o077
    written = made.stat().st_mtime_ns
    assert asked(cache) == "True 144.0"
    assert made.stat().st_mtime_ns == written
    assert asked(cache | {"OFT_DIFFUSION_KERNELS": "0"}) == "False 144.0"
    made.parent.chmod(0o777)  # where others could have put it
    assert asked(cache) == "False 144.0"


@needs_kernels
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "true"])
def test_a_compiler_that_cannot_is_no_error(compiler: str, tmp_path: Path) -> None:
    """One that refuses, none, and one that says that all is well and writes nothing."""
    assert asked({"XDG_CACHE_HOME": str(tmp_path), "CC": compiler}) == "False 144.0"
    left = tmp_path / "oft_diffusion"
    assert not left.exists() or not list(left.iterdir())


@needs_kernels
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert asked({"XDG_CACHE_HOME": str(tmp_path / "file")}) == "False 144.0"


on_linux_with_gcc = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("gcc") is None, reason="no gcc, or no Linux"
)


@on_linux_with_gcc
def test_where_there_is_gcc_the_library_is_there() -> None:
    """Or all others here would be skipped, whatever is wrong with the C."""
    assert processor.library() is not None


@on_linux_with_gcc
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("-mno-avx512f",), id="half as many lanes"),
        pytest.param(("-O1", "-fsanitize=undefined", "-fno-sanitize-recover"), id="sanitized"),
    ],
)
def test_other_compilations_warn_of_nothing_and_compute_the_same(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned = (*processor._FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *flags)
    monkeypatch.setattr(processor, "_FLAGS", warned)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = processor._loaded.__wrapped__()
    assert other is not None
    for name in ("library", "_library"):
        monkeypatch.setattr(processor, name, lambda: other)
    for size in processor.SIZES:
        x, deltas = cases.draw(13, BLOCKS * size, seed=2, device="cpu"), each(size, 2)
        made = processor.rotate(x, processor.plan_for(deltas))
        dx, ddeltas = processor.gradients(x, deltas, made)
        expected, expected_deltas = derivatives(x, deltas, made)
        assert cases.error(made[1], cases.rotated(x, deltas[1][None])) < 5e-7
        assert dx is not None
        assert ddeltas is not None
        assert cases.error(dx, expected) < 1e-6
        assert cases.error(ddeltas[1], expected_deltas[1]) < 1e-6
        packed = random_packed(3, size, 1).float()
        delta = processor.cayley_delta(packed, size)
        assert relative(delta, rotation._by_solving(rotation.unpack(packed))) < 1e-6
        assert processor.cayley_grad(delta, delta).isfinite().all()
        flat, of_packed = processor.Flat(), torch.empty_like(packed)
        flat.hold(packed, None)
        plan = processor.plan_in(flat, [0], BLOCKS, size, of_generators=True)
        [rotated] = processor.rotate(x, plan)
        assert torch.equal(rotated, processor.rotate(x, processor.plan_for([delta]))[0])
        grad = cases.draw(*x.shape, seed=3, device="cpu")
        dx = processor.rotate_back(x, plan, flat.address, [grad], plan.offsets, of_packed.data_ptr(), of_x=True)
        wanted_dx, wanted = processor.gradients(x, [delta], [grad])
        assert dx is not None
        assert wanted_dx is not None
        assert wanted is not None
        assert relative(dx, wanted_dx) < 1e-6
        assert relative(of_packed, processor.cayley_grad(delta, wanted[0])) < 2e-6


@needs_kernels
@pytest.mark.parametrize("size", processor.SIZES)
def test_generators_are_read_to_their_ends_and_no_further(size: int) -> None:
    """Between pages that may not be read, in a process of its own, which would die of it."""
    code = f"""
import ctypes, mmap, torch
from oft_diffusion.kernels import processor
each, page = {size * (size - 1) // 2}, mmap.PAGESIZE
wanted = processor.cayley_delta(torch.linspace(-0.1, 0.1, 2 * each).view(2, each), {size})
pages = 8 * each // page + 1
memory = mmap.mmap(-1, (pages + 2) * page)
begin = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
end = begin + pages * page
for place in (begin, end - 8 * each):
    given = torch.frombuffer(memory, dtype=torch.float32, count=2 * each, offset=place - begin + page).view(2, each)
    given.copy_(torch.linspace(-0.1, 0.1, 2 * each).view(2, each))
    for guard in (begin - page, end):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    assert torch.equal(processor.cayley_delta(given, {size}), wanted)
print("read")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "read\n"), run.stderr
