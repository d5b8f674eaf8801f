"""What the compiler gets to see of the rotations, without a card: prints the kernels in the graphs of both directions.

python -m tests.helpers.trace_kernels [dynamic]    # with TRITON_INTERPRET=0

The tensors are the processor's, and said to be where kernels fit; graphs are made and not run.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget

from oft_diffusion.kernels import inlined, triton_rotate, triton_shared


class Card:
    """A driver that only says for what it compiles: from that torch knows what a kernel writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def pretend() -> None:
    """Have the processor's tensors take the kernels."""
    triton.runtime.driver.set_active(Card())
    block_rotate, rotate_shared = (
        importlib.import_module(f"oft_diffusion.kernels.{name}") for name in ("block_rotate", "rotate_shared")
    )
    changes: dict[str, Any] = {
        "triton_kernels": lambda: triton_rotate,
        "kernels_for": lambda x, deltas: triton_shared,
        "has_kernel": lambda x, size: True,
        "is_small": lambda x: False,
        "by_processor": lambda x, deltas: None,
    }
    for module in (block_rotate, rotate_shared, inlined):
        for name, value in changes.items():
            if hasattr(module, name):
                setattr(module, name, value)


def kernels_in(graph: torch.fx.GraphModule) -> list[str]:
    """Names of the kernels that a graph launches; and, in capitals, ops of ours that were left in it."""
    found = []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            found.append(kernel.fn.__name__)
        elif "oft_diffusion" in str(node.target):
            found.append(str(node.target).upper())
    return found


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros([int(n) for n in like.shape], dtype=like.dtype)


def main() -> None:
    pretend()
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        [told] = [node.args[0] for node in gm.graph.nodes if node.op == "output"]
        outputs = [node and node.meta["val"] for node in told]

        def answer(*_: Any) -> list[Any]:
            return [_zeros(one) if isinstance(one, Tensor) else 1 for one in outputs]

        return make_boxed_func(answer)

    x = torch.zeros(2, 77, 96, dtype=torch.bfloat16, requires_grad=True)
    deltas = [torch.zeros(3, 32, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    ops = torch.ops.oft_diffusion

    def step(x: Tensor, *deltas: Tensor) -> Tensor:
        left, right = ops.block_rotate_shared.default(ops.block_rotate.default(x, deltas[0]), list(deltas))
        return left + right

    traced = aot_function(step, fw_compiler=keep, bw_compiler=keep, dynamic="dynamic" in sys.argv)
    out = traced(x, *deltas)
    assert out.shape == x.shape
    out.sum().backward()
    for graph in graphs:
        print(*kernels_in(graph))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "0", "the interpreter's kernels cannot be traced"
    main()
