"""What of a component torch.compile has to do with."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn


def is_compiled(model: nn.Module) -> bool:
    """Whether the module or a part of it runs as compiled code (`module.compile()`, `compile_repeated_blocks`)."""
    return any(module._compiled_call_impl is not None for module in model.modules())


class CompiledParts:
    """Tells of a component in every forward whether parts of it are compiled by now.

    Blocks are compiled by class (`compile_repeated_blocks`), so the first of each class stands for all: a walk through
    all modules takes a millisecond. A part that is compiled though the first of its class is not goes unnoticed.
    """

    def __init__(self) -> None:
        self._firsts: list[weakref.ref[nn.Module]] = []

    def there_are(self, model: nn.Module) -> bool:
        """Whether there are such parts, or the component itself is one."""
        if not self._firsts:
            firsts: dict[type[nn.Module], nn.Module] = {}
            for module in model.modules():
                firsts.setdefault(type(module), module)
            self._firsts = [weakref.ref(module) for module in firsts.values()]
        found = [module() for module in self._firsts]
        return True in [module is not None and module._compiled_call_impl is not None for module in found]

    def __getstate__(self) -> dict[str, Any]:
        return {"_firsts": []}


def in_compiled_call() -> bool:
    """Whether compiled code is traced or running, in frames too that the compiler leaves as they are."""
    if torch.compiler.is_compiling():
        return True
    return "torch._dynamo" in sys.modules and torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def reset_compiler() -> None:
    """Have compiled models trace again: dynamo does not look at hooks, so it would go on without ours."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
