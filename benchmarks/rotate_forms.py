"""Ways to rotate on a processor, beside each other: benchmarks/data/rotate_forms.csv.

python -m benchmarks.rotate_forms            # measures and appends
python -m benchmarks.rotate_forms --table    # the newest run as Markdown

`block_rotate` runs in C, in float32 on Linux with a C compiler. In plain PyTorch it takes the batched product and adds
it, or for many rows multiplies block by block where x lies; in 16 bits the sum and the product are one call. Which of
these, and why neither einsum nor a compiled form, is told by these figures. It is measured with the kernels switched
off and on; where there is no C, cells are empty.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.command import run
from benchmarks.methods import kernels_switched
from benchmarks.records import DATA, append, load
from benchmarks.stamps import commits
from benchmarks.turns import Around, Calls, spread, take_turns
from oft_diffusion.autocast import computes_in_bfloat16
from oft_diffusion.kernels import block_rotate, processor

FILE = DATA / "rotate_forms.csv"
# (rows, columns): SD 1.5's at 512 x 512, its text, and SDXL's two at 1024 x 1024.
SHAPES = ((77, 768), (256, 1280), (1024, 640), (4096, 320), (1024, 1280), (4096, 640))
SIZES = (16, 32, 64)
PLAIN, IN_C = "block_rotate in plain PyTorch", "block_rotate in C"
OTHERS = ("bmm and add", "baddbmm", "einsum", "compiled")
_FORMER = {"block_rotate": PLAIN}  # of rows that are older than C
_AROUND: dict[str, Around] = {name: partial(kernels_switched, on=name == IN_C) for name in (PLAIN, IN_C)}

Form = Callable[[Tensor, Tensor], Tensor]


def added(x: Tensor, delta: Tensor) -> Tensor:
    """One batched product of all blocks, then a sum; autograd's own backward."""
    blocks = x.view(len(x), *delta.shape[:2])
    return (blocks + torch.bmm(blocks.transpose(0, 1), delta).transpose(0, 1)).view_as(x)


def in_place(x: Tensor, delta: Tensor) -> Tensor:
    """The sum and the product in one call, on x where it lies."""
    blocks = x.view(len(x), *delta.shape[:2]).transpose(0, 1)
    return torch.baddbmm(blocks, blocks, delta).transpose(0, 1).reshape_as(x)


def einsum(x: Tensor, delta: Tensor) -> Tensor:
    """As a reader would write it down."""
    blocks = x.view(len(x), *delta.shape[:2])
    return (blocks + torch.einsum("nrb,rbc->nrc", blocks, delta)).view_as(x)


def forms() -> dict[str, Form]:
    """All of them; the compiled one is the batched product's."""
    others = (added, in_place, einsum, torch.compile(added, dynamic=False))
    return {PLAIN: block_rotate, IN_C: block_rotate, **dict(zip(OTHERS, others, strict=True))}


def measure(device: str, rounds: int) -> None:
    """Append one run."""
    # One code object serves every shape: by default dynamo would fall back to eager, and say nothing.
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        _measure(device, rounds)


def _measure(device: str, rounds: int) -> None:
    ways = forms()
    dtypes = [torch.float32, *([torch.bfloat16] if computes_in_bfloat16(device) else [])]
    for dtype in dtypes:
        for n, columns in SHAPES:
            for size in SIZES:
                torch.manual_seed(0)
                x = torch.randn(n, columns, device=device).to(dtype)
                delta = (torch.randn(columns // size, size, size, device=device) * 0.05).to(dtype)
                stage = {name: _calls(form, x, delta) for name, form in ways.items()}
                shape = {"rows": n, "columns": columns, "dtype": str(dtype).removeprefix("torch."), "block_size": size}
                append(FILE, [shape | row for row in _in_turns(stage, rounds, in_c=_is_for_c(x, size))])


def _is_for_c(x: Tensor, size: int) -> bool:
    with kernels_switched(on=True):
        return processor.fits(x, size)


def _in_turns(stage: Mapping[str, Calls], rounds: int, *, in_c: bool) -> list[dict[str, str]]:
    """A row for each form and kind; without C its own are empty, and give the reason."""
    running = {name: calls for name, calls in stage.items() if in_c or name != IN_C}
    take_turns(running, 3, around=_AROUND)
    times, reasons = take_turns(running, rounds, around=_AROUND)
    if not in_c:
        reasons[IN_C] = "C needs Linux, a C compiler and float32"
    return [
        {"form": name, "kind": kind, **spread(times.get(name, {}).get(kind, [])), "reason": reasons.get(name, "")}
        for name, calls in stage.items()
        for kind in calls
    ]


def _calls(form: Form, x: Tensor, delta: Tensor) -> dict[str, Callable[[], object]]:
    learning = x.clone().requires_grad_(), delta.clone().requires_grad_()
    grad = torch.randn_like(x)
    return {
        "rotate": torch.no_grad()(lambda: form(x, delta)),
        "rotate and backward": lambda: torch.autograd.grad(form(*learning), learning, grad),
    }


def table() -> str:
    """The newest run: of each form, time over that of `block_rotate` in plain PyTorch in the same round."""
    rows = load(FILE)
    if not rows:
        return "Not measured yet."
    newest = [row for row in rows if (row["date"], row["hardware"]) == (rows[-1]["date"], rows[-1]["hardware"])]
    names = (IN_C, *OTHERS)
    lines = [f"| rows x columns | dtype | b | {PLAIN}, ms | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    shown: list[dict[str, str]] = []
    for kind in ("rotate", "rotate and backward"):
        lines.append(f"| **{kind}** |" + " |" * (3 + len(names)))
        found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
        for row in newest:
            if row["kind"] == kind:
                key = row["rows"], row["columns"], row["dtype"], row["block_size"]
                found.setdefault(key, {})[_FORMER.get(row["form"], row["form"])] = row
        for shape, made in found.items():
            shown += made.values()
            own = _seconds(made[PLAIN])
            cells = [_ratio(_seconds(made[name]), own) if name in made else "" for name in names]
            first = f"{shape[0]} x {shape[1]} | {shape[2]} | {shape[3]} | {1000 * statistics.median(own):.2f}"
            lines.append(f"| {first} | {' | '.join(cells)} |")
    last = newest[-1]
    about = f"{last['hardware']}, {last['threads']} threads, torch {last['torch']}; commit {commits(shown)}."
    return "\n".join([*lines, "", about])


def _seconds(row: dict[str, str]) -> list[float]:
    return [float(word) for word in row["seconds"].split()]


def _ratio(times: list[float], own: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(times, own, strict=True)):.2f}" if times else ""


if __name__ == "__main__":
    run(__doc__, measure, table, rounds=15, devices=["cpu"])
