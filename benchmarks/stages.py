"""Where an adapter's share of a training step goes: benchmarks/data/stages.csv.

python -m benchmarks.stages                  # measures the processor and appends
python -m benchmarks.stages --device cuda    # a CUDA card
python -m benchmarks.stages --table          # the newest run of each machine as Markdown

Of every adapted layer's input in one step of SD 1.5 (cut for processors as in `benchmarks.speed`) the shape is noted.
Then each stage is done for all layers one after another, as a step does it: D is built, inputs are rotated (q, k and v
together), their gradients are rotated back, D's gradients are added up, and go back into the generators. In C that is
how several adapters are trained, or one whose D is scaled; of one as it comes each D is built where it is used, and
there are two stages, which are measured beside those.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.command import run
from benchmarks.counting import kernels_of, leaf_operations
from benchmarks.records import DATA, append, load
from benchmarks.speed import make_work
from benchmarks.speed_setups import Setup
from benchmarks.turns import spread, take_turns
from oft_diffusion import OFTConfig
from oft_diffusion.kernels import block_rotate, block_rotate_shared, processor, processor_graph
from oft_diffusion.kernels.processor_graph import Rebuilt
from oft_diffusion.rotation import packed_size, rotation_delta
from oft_diffusion.targets import find_targets, projections_of_one_input

FILE = DATA / "stages.csv"
STAGES = ("building D", "rotating inputs", "gradients of inputs", "gradients of D", "gradients of generators")
IN_PLACE = ("rotating inputs, D built there", "all gradients, D built there")


class Read(NamedTuple):
    """An input, and how many layers read it."""

    x: Tensor
    layers: int


def inputs_of(setup: Setup, device: str) -> list[Read]:
    """What the work's adapted layers read in one step, each tensor once."""
    work = make_work(setup, device)
    [names] = work.targets()
    layers = {name: work.denoiser.get_submodule(name) for name in names}
    groups = projections_of_one_input(work.denoiser, find_targets(work.denoiser, "attention"))
    first = {group[0]: len(group) for group in groups}
    others = {name for group in groups for name in group[1:]}
    found: list[Read] = []

    def noting(count: int) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, args: found.append(Read(torch.randn_like(args[0]), count))

    hooks = [
        layer.register_forward_pre_hook(noting(first.get(name, 1)))
        for name, layer in layers.items()
        if name not in others
    ]
    with torch.no_grad():
        work()
    for hook in hooks:
        hook.remove()
    return found


def stages(reads: list[Read], block_size: int) -> dict[str, Callable[[], object]]:
    """By name, what a step does for all layers."""
    blocks = [read.x.shape[-1] // block_size for read in reads]
    total = sum(count * read.layers for count, read in zip(blocks, reads, strict=True))
    x = reads[0].x
    packed = (torch.randn(total, packed_size(block_size), device=x.device) * 0.02).requires_grad_()
    config = OFTConfig(block_size=block_size)

    def build() -> Tensor:
        return rotation_delta(packed, config)

    built = build()
    counts = [n for n, read in zip(blocks, reads, strict=True) for _ in range(read.layers)]
    deltas = iter(built.detach().to(x.dtype).split(counts))
    given = [(read, [next(deltas).clone() for _ in range(read.layers)]) for read in reads]

    def rotate(*, of_x: bool, of_delta: bool) -> list[tuple[list[Tensor], list[Tensor]]]:
        made = []
        for read, own in given:
            inputs = [read.x.detach().requires_grad_(of_x), *(d.detach().requires_grad_(of_delta) for d in own)]
            first, *rest = inputs
            out = block_rotate_shared(first, rest) if len(rest) > 1 else [block_rotate(first, rest[0])]
            made.append((out, inputs))
        return made

    def backward(*, of_x: bool, of_delta: bool) -> Callable[[], None]:
        made = rotate(of_x=of_x, of_delta=of_delta)
        grads = [[torch.randn_like(y) for y in out] for out, _ in made]

        def call() -> None:
            for (out, inputs), grad in zip(made, grads, strict=True):
                wanted = [tensor for tensor in inputs if tensor.requires_grad]
                torch.autograd.grad(out, wanted, grad, retain_graph=True)

        return call

    def to_generators() -> None:
        torch.autograd.grad(built, packed, built.detach(), retain_graph=True)

    calls: tuple[Callable[[], object], ...] = (
        torch.no_grad()(build),
        lambda: rotate(of_x=False, of_delta=False),
        backward(of_x=True, of_delta=False),
        backward(of_x=False, of_delta=True),
        to_generators,
    )
    return dict(zip(STAGES, calls, strict=True))


def in_place(reads: list[Read], block_size: int) -> dict[str, Callable[[], object]]:
    """By name, what a step does in C for all layers of one adapter as it comes."""
    blocks = [read.x.shape[-1] // block_size for read in reads]
    begins = [0, *accumulate(count * read.layers for count, read in zip(blocks, reads, strict=True))]
    packed = (torch.randn(begins.pop(), packed_size(block_size)) * 0.02).requires_grad_()
    source, flat = Rebuilt(lambda aliases: aliases[0], [packed]), processor.Flat()
    starts = [
        [begin + count * i for i in range(read.layers)]
        for begin, count, read in zip(begins, blocks, reads, strict=True)
    ]
    plans = [
        processor.plan_in(flat, own, count, block_size, of_generators=True)
        for own, count in zip(starts, blocks, strict=True)
    ]

    def rotate() -> list[Tensor]:
        flat.hold(source.for_forward(), source if torch.is_grad_enabled() else None)
        return [y for x, plan in zip(inputs, plans, strict=True) for y in processor_graph.rotated(x, plan)]

    inputs = [read.x.detach().requires_grad_() for read in reads]
    made = rotate()
    grads = [torch.randn_like(y) for y in made]
    calls = torch.no_grad()(rotate), lambda: torch.autograd.grad(made, [packed, *inputs], grads, retain_graph=True)
    return dict(zip(IN_PLACE, calls, strict=True))


def measure(device: str, rounds: int) -> None:
    """Append one run."""
    on_card = device == "cuda"
    setup = Setup("SD 1.5", small=not on_card, dtype="bfloat16" if on_card else "float32")
    reads = inputs_of(setup, device)
    in_c = not on_card and processor.library() is not None  # where a profiler sees no operations
    calls = stages(reads, setup.block_size) | (in_place(reads, setup.block_size) if in_c else {})
    take_turns({"ours": calls}, 2, device)
    times, _ = take_turns({"ours": calls}, rounds, device)
    rows = []
    for stage, call in calls.items():
        kernels, on_card_for = kernels_of(call) if on_card else ("", "")
        rows.append(
            {
                "work": setup.work, "small": setup.small, "dtype": setup.dtype, "block_size": setup.block_size,
                "inputs": len(reads), "layers": sum(read.layers for read in reads), "stage": stage,
                "operations": "" if in_c else leaf_operations(call), "kernels": kernels, "kernel_seconds": on_card_for,
                **spread(times["ours"][stage]),
            }
        )  # fmt: skip
    append(FILE, rows, device)


def table() -> str:
    """The newest run of each machine."""
    newest = {row["hardware"]: row["date"] for row in load(FILE)}
    rows = {(r["hardware"], r["stage"]): r for r in load(FILE) if r["date"] == newest[r["hardware"]]}
    parts = []
    for machine in newest:
        own = [rows[machine, stage] for stage in (*STAGES, *IN_PLACE) if (machine, stage) in rows]
        # Of Triton's kernels the profiler sees no operations.
        counted = next((name for name in ("kernels", "operations") if own[0][name]), "operations")
        lines = [f"| stage | ms | {counted} |", "|---|---|---|"]
        for row in own:
            low, middle, high = (1000 * float(row[name]) for name in ("low", "median", "high"))
            lines.append(f"| {row['stage']} | {middle:.2f} ({low:.2f} to {high:.2f}) | {row[counted]} |")
        about = own[0]
        lines += [
            "",
            f"{machine}, {about['threads']} threads, torch {about['torch']}, {about['dtype']}; {about['date']}.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not measured yet."


if __name__ == "__main__":
    run(__doc__, measure, table, rounds=15)
