"""Under `torch.compile` the kernels are in the graph: traced without a card; on one they run without our Python."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from oft_diffusion.kernels import block_rotate, block_rotate_shared
from tests.core import rotate_cases as cases


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("shapes", ["fixed", "dynamic"])
def test_the_compiler_sees_kernels_and_no_op(shapes: str) -> None:
    command = [sys.executable, "-m", "tests.helpers.trace_kernels", shapes]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    forward, backward = done.stdout.splitlines()[-2:]
    assert forward.split() == ["_rotate_kernel", "_shared_kernel"]
    assert backward.split() == ["_shared_kernel", "_delta_grads_kernel", "_rotate_kernel", "_delta_grad_kernel"]


@pytest.mark.gpu
def test_a_compiled_step_launches_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from oft_diffusion.kernels import triton_rotate, triton_shared

    def step(x: Tensor, deltas: list[Tensor]) -> Tensor:
        q, k = block_rotate_shared(x, deltas)
        return block_rotate((q * k).sin(), deltas[0])

    def gradients(form: object, rows: int) -> list[Tensor]:
        x = cases.draw(2, rows, 96, seed=rows, device="cuda").requires_grad_()
        deltas = [d.requires_grad_() for d in cases.deltas(32, torch.float32, "cuda", groups=2).unbind()]
        out = form(x, deltas)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, *deltas))]

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    lengths = (77, 4096, 200)
    expected = [gradients(step, rows) for rows in lengths]
    for rows in lengths:
        gradients(compiled, rows)
    for module in (triton_rotate, triton_shared):
        monkeypatch.setattr(module, "launch", None)
        monkeypatch.setattr(module, "again", None)
    for rows, wanted in zip(lengths, expected, strict=True):
        for found, one in zip(gradients(compiled, rows), wanted, strict=True):
            assert cases.error(found, one.double().cpu()) < 1e-5
