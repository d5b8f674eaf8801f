"""Compile the Triton kernels for a graphics card without having one: to machine code, by the table of tiles.

python -m tests.helpers.compile_kernels 90 [80 ...]    # compute capabilities; what each kernel takes of the card

What the interpreter cannot see is seen here: products that the hardware has no instruction for, and too much shared
memory. Says nothing about speed. Fails (exit status 1) where a kernel would not fit.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oft_diffusion.kernels import triton_rotate
from oft_diffusion.kernels.tiles import DTYPES, SIZES, tile_of

# Bytes of shared memory that one program can have.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Tensor cores of Hopper, of other cards, no tensor cores; atomic additions.
INSTRUCTIONS = {"wgmma": "wgmma", "mma": "mma.sync", "fma": "fma.rn.f32", "atomics": "(red|atom).global"}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compiled(capability: int, sizes: Sequence[int] = SIZES, dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[Any]:
    """(what, compiled kernel), for both kernels, both ways of adding up, contiguous and strided x."""
    target = GPUTarget("cuda", capability, 32)
    for size in sizes:
        for name in dtypes:
            pointer = TYPES[DTYPES[name]]
            tile = tile_of("rotate", size, DTYPES[name])
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            own = {"SIZE": size, "WIDTH": tile.width, "ROWS": tile.rows, "PRECISION": "ieee", "UPCAST": False}
            for levels in (1, 2):
                source = _source(
                    triton_rotate._rotate_kernel,
                    {"x_ptr": pointer, "delta_ptr": pointer, "out_ptr": pointer},
                    {**own, "STEPS": tile.steps, "LEVELS": levels},
                )
                yield f"rotate {size} {name}, levels {levels}", triton.compile(source, target=target, options=options)
            tile = tile_of("delta_grad", size, DTYPES[name])
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            own |= {"WIDTH": tile.width, "ROWS": tile.rows, "LEVELS": 1}
            for atomic in (True, False):
                source = _source(
                    triton_rotate._delta_grad_kernel,
                    {"x_ptr": pointer, "grad_ptr": pointer, "out_ptr": "*fp32"},
                    {**own, "ATOMIC": atomic},
                )
                yield (
                    f"delta_grad {size} {name}, atomic {atomic}",
                    triton.compile(source, target=target, options=options),
                )


def _source(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """As Triton would specialise for sizes and strides that are multiples of 16, which models' are."""
    kinds = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kinds.items())
        if kind != "constexpr" and name not in ("blocks", "parts", "row_programs", "groups", "delta_column")
    }
    return ASTSource(kernel, kinds, constexprs=constants, attrs=aligned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", nargs="+", type=int, choices=sorted(SHARED))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES))
    options = parser.parse_args()
    too_large = []
    for capability in options.capabilities:
        for what, kernel in compiled(capability, options.sizes, options.dtypes):
            shared, assembly = kernel.metadata.shared, kernel.asm["ptx"]
            instructions = " ".join(name for name, spelt in INSTRUCTIONS.items() if re.search(rf"\b{spelt}", assembly))
            print(f"sm_{capability} {what}: {shared} bytes shared, cubin {len(kernel.asm['cubin'])}, {instructions}")
            if shared > SHARED[capability]:
                too_large.append(f"sm_{capability} {what}")
    if too_large:
        raise SystemExit("too much shared memory: " + "; ".join(too_large))


if __name__ == "__main__":
    main()
