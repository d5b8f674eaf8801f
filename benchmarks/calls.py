"""Python functions that a training step of SD 1.5's shape enters, above the base's: a count, which does not wobble.

python -m benchmarks.calls  # a minute, on a processor
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.counting import python_calls
from benchmarks.methods import BASE, LORA, METHODS, NATIVE, OURS, PEFT_OFT, kernels_switched
from benchmarks.works import WORKS, Sizes


def count(name: str) -> int:
    """Of one method, all of a step's."""
    torch.manual_seed(0)
    work = WORKS["SD 1.5"](Sizes(), small=True)
    work.requires_grad_(False)
    if name == BASE:
        work.let_gradients_through()
    trained: list[Tensor] = [*METHODS[name].adapt(work.denoiser, work.targets()[0], 32).trained]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        work().square().mean().backward()

    with kernels_switched(on=name == NATIVE):
        for _ in range(2):
            step()
        return python_calls(step)


def main() -> None:
    base = count(BASE)
    print("| method | Python functions above the base's |\n|---|---|")
    for name in (NATIVE, OURS, LORA, PEFT_OFT):
        print(f"| {name} | {count(name) - base:,} |")


if __name__ == "__main__":
    main()
