"""The candidate for one kernel of rotation and linear (`benchmarks.fused_kernel`): the interpreter's and a card's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import fused_linear, records
from oft_diffusion.kernels.tiles import DTYPES
from tests.core.rotate_cases import deltas, draw, error, lying, rotated

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Two roundings, of the rotated x and of y; the interpreter cuts bfloat16 off where a card rounds.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.2e-2, "float16": 1e-3}
# (b, blocks, inner of a tile): steps that end with x's columns, and that do not; one block a step, and several.
CUTS = [(16, 5, 32), (16, 4, 64), (32, 3, 32), (32, 3, 64), (64, 2, 64)]


def check(size: int, blocks: int, inner: int, name: str, device: str, *, lie: str, layers: int, bias: bool) -> None:
    """70 rows and 40 columns, multiples of no tile, against the definition in float64."""
    from benchmarks.fused_kernel import Config, fused_linear, fused_linears

    dtype, config = DTYPES[name], Config(16, 32, inner, 4, 2)
    x = lying(draw(2, 35, blocks * size, seed=2, device=device, dtype=dtype))[lie]
    each = [deltas(size, dtype, device, groups=1, blocks=blocks)[0] * (1 + i) for i in range(layers)]
    weights = [draw(40, blocks * size, seed=3 + i, device=device, dtype=dtype) for i in range(layers)]
    biases = [9 * draw(40, seed=6 + i, device=device, dtype=dtype) if bias else None for i in range(layers)]
    made = fused_linears(x, each, weights, biases, config)
    assert len(made) == layers
    for out, delta, weight, own in zip(made, each, weights, biases, strict=True):
        expected = rotated(x, delta[None]) @ weight.double().cpu().T
        expected = expected if own is None else expected + own.double().cpu()
        assert (out.shape, out.dtype, out.is_contiguous()) == ((2, 35, 40), dtype, True)
        assert error(out, expected) < TOLERANCE[name]
        assert error(out, x.double().cpu() @ weight.double().cpu().T) > 0.3
    assert torch.equal(fused_linear(x, each[0], weights[0], biases[0], config), made[0])


def check_every_cut(name: str, device: str) -> None:
    places = ["contiguous", "columns", "slice", "channels first", "transposed"]
    for i, (cut, lie) in enumerate(zip(CUTS, places, strict=True)):
        check(*cut, name, device, lie=lie, layers=1 + i % 3, bias=i % 2 == 0)


def interpreted() -> bool:
    from oft_diffusion.kernels import launch

    return launch.INTERPRETED


@pytest.mark.thinned(2)
@needs_triton
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_the_definition(name: str) -> None:
    if not interpreted():
        pytest.skip("Triton compiles here: the card's test runs these cases")
    check_every_cut(name, "cpu")


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_the_definition_on_a_card(name: str) -> None:
    check_every_cut(name, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 32, 64])
def test_every_configuration_is_right_on_a_card(size: int) -> None:
    from benchmarks.fused_kernel import configs_for, fused_linear

    x = draw(300, 4 * size + 64, seed=2, device="cuda", dtype=torch.bfloat16)
    delta = deltas(size, torch.bfloat16, "cuda", groups=1, blocks=x.shape[1] // size)
    weight = draw(320, x.shape[1], seed=3, device="cuda", dtype=torch.bfloat16)
    expected = rotated(x, delta) @ weight.double().cpu().T
    for config in configs_for(size):
        assert error(fused_linear(x, delta[0], weight, None, config), expected) < 5e-3, config


@needs_triton
def test_programs_that_share_rows_each_have_their_own_tile() -> None:
    """More row tiles than a group has, the last group not full."""
    if not interpreted():
        pytest.skip("Triton compiles here")
    from benchmarks.fused_kernel import Config, fused_linears

    x, delta = draw(16 * 10 + 3, 16, seed=0, device="cpu"), deltas(16, torch.float32, "cpu", groups=1, blocks=1)
    weights = [draw(33, 16, seed=i, device="cpu") for i in (1, 2)]
    made = fused_linears(x, [delta[0]] * 2, weights, [None] * 2, Config(16, 16, 16, 4, 2))
    for out, weight in zip(made, weights, strict=True):
        assert error(out, rotated(x, delta) @ weight.double().T) < 2e-6


@needs_triton
@pytest.mark.slow
def test_every_configuration_compiles_for_a_hopper_fits_and_spills_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.fused_kernel", "90"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wgmma" in done.stdout
    assert "wgmma 0" not in done.stdout, "products run on tensor cores"


def test_the_table_is_of_the_newest_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "FILE", tmp_path / "fused_linear.csv")
    assert fused_linear.table().startswith("Not measured")
    rows = [
        {
            "size": "SDXL", "rows": 8, "inner": 64, "columns": 32, "layers": 3, "dtype": "bfloat16", "block_size": 32,
            "way": way, "mode": mode, "rounds": 1, "microseconds": took, "config": "128x64x64x4x3", "error": "",
        }
        for mode, scale in (("graph", 1.0), ("eager", 4.0))
        for way, took in (("plain", 10 * scale), ("rotated", 15 * scale), ("fused", 12 * scale))
    ]  # fmt: skip
    records.append(fused_linear.FILE, rows, "cpu")
    shown = fused_linear.table()
    assert "| SDXL | 8 × 64 → 3 × 32 | 10.0 | 1.50 | 1.20 | 40.0 | 1.50 | 1.20 | 128x64x64x4x3 |" in shown
