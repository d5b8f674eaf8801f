"""The Triton kernels in Triton's interpreter, which `conftest.py` turns on where there is no GPU; who gets them.

The same cases on a card: `test_gpu_rotate.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import tune_rotate
from oft_diffusion.kernels import tiles
from tests.core import rotate_cases as cases

# By its path: the package has a function of the same name.
dispatch = importlib.import_module("oft_diffusion.kernels.block_rotate")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def ops() -> Any:
    """`triton_rotate`, interpreted."""
    from oft_diffusion.kernels import launch, triton_rotate

    if not launch.INTERPRETED:
        pytest.skip("Triton compiles here (TRITON_INTERPRET is not 1): test_gpu_rotate.py runs these cases")
    return triton_rotate


@pytest.mark.thinned(5)
@needs_triton
@pytest.mark.parametrize(("size", "name"), cases.EVERY)
def test_every_size_and_dtype_is_the_definition(ops: Any, size: int, name: str) -> None:
    cases.check_every_kernel(ops, size, name, "cpu")


@needs_triton
@pytest.mark.parametrize(("size", "name"), cases.EVERY)
def test_the_committed_tiles_are_right(ops: Any, size: int, name: str) -> None:
    cases.check_committed_tiles(ops, size, name, "cpu")


@pytest.mark.thinned(5)
@needs_triton
@pytest.mark.parametrize(("size", "name"), cases.EVERY)
def test_layers_of_one_input(ops: Any, size: int, name: str) -> None:
    from oft_diffusion.kernels import triton_shared

    cases.check_shared(triton_shared, size, name, "cpu", count=2 + size % 3 % 2)


@needs_triton
@pytest.mark.parametrize("size", [8, 16])
def test_strides_do_not_matter(ops: Any, size: int) -> None:
    cases.check_strides(ops, size, "cpu")


@needs_triton
def test_rows_are_read_where_they_lie(ops: Any) -> None:
    x = cases.draw(4, 5, 48, seed=0, device="cpu")
    read = {name: ops.rows_of(one, 2).tensor.data_ptr() == one.data_ptr() for name, one in cases.lying(x).items()}
    assert read == {name: name != "channels first" for name in read}
    deep = x.expand(2, 3, 4, 5, 48).permute(3, 0, 2, 1, 4)
    assert ops.rows_of(deep, 1).tensor.is_contiguous(), "three levels of strides are copied"


@needs_triton
def test_nothing_is_rotated_to_nothing(ops: Any) -> None:
    cases.check_empty(ops, "cpu")


@needs_triton
def test_offsets_beyond_32_bits(ops: Any) -> None:
    cases.check_far_apart(ops, "cpu")


@pytest.mark.thinned(2)
@needs_triton
@pytest.mark.parametrize(("size", "name"), [(8, "float32"), (32, "bfloat16"), (16, "float16")])
def test_every_way_of_adding_up(ops: Any, size: int, name: str) -> None:
    gradient = cases.check_determinism(ops, size, name, "cpu")
    seen = []
    allocate = torch.Tensor.new_zeros

    def noticing(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(options.get("dtype"))
        return allocate(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", noticing)
        gradient()
        assert seen == [torch.float32], "atomics add into one float32 buffer"
        with cases.deterministic():
            gradient()
        assert len(seen) == 1, "no atomics"


@needs_triton
@pytest.mark.parametrize("size", [8, 24])
def test_gpu_tensors_take_the_kernels_where_they_fit_and_the_pure_torch_form_elsewhere(
    ops: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    taken = []
    monkeypatch.setattr(dispatch, "triton_kernels", lambda: ops)
    for name in ("rotate", "delta_grad"):
        real = getattr(ops, name)

        def noticed(*arguments: Any, name: str = name, real: Any = real) -> Any:
            taken.append(name)
            return real(*arguments)

        monkeypatch.setattr(ops, name, noticed)
    x, delta = cases.draw(5, 3 * size, seed=0, device="cpu"), cases.deltas(size, torch.float32, "cpu", groups=1)
    assert cases.error(dispatch.rotate_on_gpu(x, delta), cases.rotated(x, delta)) < 1e-6
    found = dispatch.delta_grad_on_gpu(x, x, list(delta.shape))
    assert cases.error(found, cases.delta_gradient(x, x, 1, size)) < 1e-6
    assert taken == (["rotate", "delta_grad"] if size == 8 else [])
    taken.clear()
    assert torch.equal(
        dispatch.rotate_on_gpu(x.double(), delta.double()), dispatch.rotate_in_torch(x.double(), delta.double())
    )
    assert not taken, "float64 is for checking, on any device"


def test_cuda_has_kernels_of_its_own() -> None:
    for name in ("block_rotate", "block_rotate_delta_grad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"oft_diffusion::{name}", "CUDA")


@pytest.mark.parametrize("lack", ["triton", "compiler", "permission"])
def test_without_triton_or_a_compiler_the_pure_torch_form_serves(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.delenv("OFT_DIFFUSION_KERNELS", raising=False)
    if lack == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    elif lack == "compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("OFT_DIFFUSION_KERNELS", "0")
    dispatch.triton_kernels.cache_clear()
    try:
        assert dispatch.triton_kernels() is None
        x, delta = cases.draw(5, 24, seed=0, device="cpu"), cases.deltas(8, torch.float32, "cpu", groups=1)
        assert torch.equal(dispatch.rotate_on_gpu(x, delta), dispatch.rotate_in_torch(x, delta))
    finally:
        dispatch.triton_kernels.cache_clear()


@needs_triton
def test_kernels_are_taken_where_they_can_be(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFT_DIFFUSION_KERNELS", raising=False)
    monkeypatch.setenv("CC", "cc")
    dispatch.triton_kernels.cache_clear()
    try:
        assert dispatch.triton_kernels() is ops
    finally:
        dispatch.triton_kernels.cache_clear()


def test_importing_the_package_does_not_import_the_kernels() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch, oft_diffusion\nfrom oft_diffusion.kernels import block_rotate\n"
        "block_rotate(torch.ones(2, 8, requires_grad=True), torch.zeros(1, 8, 8)).sum().backward()\n"
        "assert 'oft_diffusion.kernels.triton_rotate' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize(("size", "name"), [(8, "bfloat16"), pytest.param(32, "float16", marks=pytest.mark.slow)])
def test_they_compile_to_machine_code_for_a_card(size: int, name: str) -> None:
    command = [sys.executable, "-m", "tests.helpers.compile_kernels", "80", "--sizes", str(size), "--dtypes", name]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all("mma" in line for line in lines), "16-bit products run on tensor cores"
    assert all(("atomics" in line) == ("atomic True" in line) for line in lines), "atomics, and only where asked for"


def test_the_table_has_a_row_for_everything_and_says_whether_it_was_measured() -> None:
    for kernel in ("rotate", "delta_grad"):
        rows = tiles.table()[kernel]
        assert list(rows) == [f"{size} {name}" for size in tiles.SIZES for name in tiles.DTYPES]
        for size, name in cases.EVERY:
            tile = tiles.tile_of(kernel, size, tiles.DTYPES[name])
            assert tile.width % size == 0
            assert min(tile.rows, tile.width) >= 16
            assert all(value & (value - 1) == 0 for value in (tile.rows, tile.width, tile.warps))
    assert tune_rotate.written(tiles.table(), tune_rotate.tuned_on()) == tiles.FILE.read_text(encoding="utf-8")


def test_tuning_finds_the_best_tile_without_trying_them_all() -> None:
    wanted, tried = tiles.Tile(64, 4, 64, 8, 2), []

    def seconds(tile: tiles.Tile) -> float:
        tried.append(tile)
        if tile.stages == 3:
            return float("inf")  # does not fit
        return sum(abs(math.log2(a / b)) for a, b in zip(tile, wanted, strict=True))

    best, took = tune_rotate.descended(tiles.Tile(16, 1, 32, 2, 3), 32, seconds)
    assert (best, took) == (wanted, 0.0)
    assert len(tried) == len(set(tried)) < 40
    assert all(tile.rows * tile.width <= 16384 for tile in tried)


@needs_triton
@pytest.mark.parametrize("count", [2, 3])
def test_each_way_is_one_launch_for_one_layer_and_for_several(
    ops: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """What a card is asked per attention does not grow: a regression would show in a step's launches."""
    from oft_diffusion.kernels import launch, triton_rotate, triton_shared

    launched: list[str] = []
    real = launch.launch

    def noticed(*arguments: Any, **options: Any) -> None:
        launched.append("it")
        real(*arguments, **options)

    for module in (triton_rotate, triton_shared):
        monkeypatch.setattr(module, "launch", noticed)
    x, delta = cases.draw(5, 48, seed=0, device="cpu"), cases.deltas(16, torch.float32, "cpu", groups=1)[0]
    each = [delta * (1 + i) for i in range(count)]
    for way in (
        lambda: ops.rotate(x, delta),
        lambda: ops.delta_grad(x, x, list(delta.shape)),
        lambda: triton_shared.rotate(x, each),
        lambda: triton_shared.input_grad(x, each, [x] * count),
        lambda: triton_shared.delta_grads(x, [x] * count, *delta.shape[:2]),
    ):
        launched.clear()
        way()
        assert launched == ["it"]
