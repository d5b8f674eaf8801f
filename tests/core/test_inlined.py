"""Under `torch.compile` the kernels are in the graph: traced without a card; on one they run without our Python."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oft_diffusion.kernels import block_rotate, block_rotate_shared
from tests.core import rotate_cases as cases

dispatch = importlib.import_module("oft_diffusion.kernels.block_rotate")


@pytest.mark.thinned(2)
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


@pytest.mark.parametrize("form", ["torch", "one text", "another"])
def test_compiled_code_is_kept_for_these_kernels_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's caches on disk go by the graph before the kernels are in it."""
    monkeypatch.setattr(dispatch, "_kernels_here", lambda: None if form == "torch" else object())
    monkeypatch.setattr(dispatch, "_digest", lambda: form)
    monkeypatch.setattr(dispatch, "_SMALL", 0)  # small ones on a processor are no ops
    found: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(node.kwargs["form"] for node in graph.graph.nodes if "oft_diffusion" in str(node.target))
        return graph

    def both(x: Tensor, delta: Tensor) -> list[Tensor]:
        return [block_rotate(x, delta), *block_rotate_shared(x, [delta, delta])]

    torch.compiler.reset()
    x, delta = torch.randn(3, 16), torch.zeros(2, 8, 8)
    for made in torch.compile(both, backend=look, fullgraph=True)(x, delta):
        assert torch.equal(made, x)
    assert found == [form, form]


def test_the_text_is_of_all_kernels_and_tiles() -> None:
    files = {path.name for path in Path(dispatch.__file__ or "").parent.iterdir()}
    assert {"launch.py", "tiles.json", "triton_rotate.py", "triton_shared.py"} < files
    digest = dispatch._digest()
    assert len(digest) == 16
    assert digest == dispatch._digest.__wrapped__()


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
