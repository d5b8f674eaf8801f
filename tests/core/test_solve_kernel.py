"""The candidate for one kernel that solves for D (`benchmarks.solve_kernel`): the interpreter's and a card's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from oft_diffusion.rotation import cayley_delta, packed_size, unpack

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def check(size: int, norm: float, device: str) -> None:
    """Five blocks, D and the generators' gradient, against the exact ones in float64."""
    from benchmarks.solve_kernel import solved_delta

    torch.manual_seed(size)
    packed = torch.randn(5, packed_size(size), dtype=torch.float64)
    packed = packed * (norm / torch.linalg.matrix_norm(unpack(packed), 2))[:, None]
    grad = torch.randn(5, size, size, dtype=torch.float64)
    answers = []
    for form, dtype in ((cayley_delta, torch.float64), (solved_delta, torch.float32)):
        own = packed.to(device, dtype).requires_grad_()
        delta = form(unpack(own))
        [found] = torch.autograd.grad(delta, own, grad.to(device, dtype))
        answers.append((delta.detach().double().cpu(), found.double().cpu()))
    for exact, made in zip(*answers, strict=True):
        assert float((made - exact).abs().max() / exact.abs().max()) < 5e-6


@needs_triton
@pytest.mark.parametrize("norm", [0.1, 0.7, 20.0])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_it_is_the_exact_rotation(size: int, norm: float) -> None:
    from oft_diffusion.kernels import launch

    if not launch.INTERPRETED:
        pytest.skip("Triton compiles here: the card's test runs these cases")
    check(size, norm, "cpu")


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_it_is_the_exact_rotation_on_a_card(size: int) -> None:
    for norm in (0.1, 0.7, 20.0):
        check(size, norm, "cuda")


@needs_triton
@pytest.mark.slow
def test_it_compiles_for_a_hopper() -> None:
    command = [sys.executable, "-m", "benchmarks.solve_kernel", "90"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("spills False") == 4
