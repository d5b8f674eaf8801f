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

from oft_diffusion.kernels import triton_rotate, triton_shared
from oft_diffusion.kernels.tiles import DTYPES, SIZES, Tile, tile_of

# Bytes of shared memory that one program can have.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Tensor cores of Hopper, of other cards, no tensor cores; atomic additions.
INSTRUCTIONS = {"wgmma": "wgmma", "mma": "mma.sync", "fma": "fma.rn.f32", "atomics": "(red|atom).global"}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compiled(capability: int, sizes: Sequence[int] = SIZES, dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[Any]:
    """(what, compiled kernel), for every kernel, both ways of adding up, contiguous and strided x."""
    target = GPUTarget("cuda", capability, 32)
    for size in sizes:
        for name in dtypes:
            for what, kernel, pointers, constants, tile in _kernels(size, name):
                source = _source(kernel, pointers, constants)
                options = {"num_warps": tile.warps, "num_stages": tile.stages}
                yield f"{what} of {size} {name}", triton.compile(source, target=target, options=options)


def _kernels(size: int, name: str) -> Iterator[tuple[str, Any, str, dict[str, Any], Tile]]:
    """(what, kernel, type of what it reads, constants, tile)."""
    dtype = DTYPES[name]
    tile = tile_of("rotate", size, dtype)
    own = {"SIZE": size, "PRECISION": "ieee", "UPCAST": False}
    rotates = {**own, "WIDTH": tile.width, "ROWS": tile.rows, "STEPS": tile.steps, "LEVELS": 1}
    for levels, turned in ((1, False), (2, True)):
        constants = {**rotates, "LEVELS": levels, "TURNED": turned}
        yield f"rotate, levels {levels}", triton_rotate._rotate_kernel, TYPES[dtype], constants, tile
    for gathers in (False, True):
        constants = {**rotates, "COUNT": 3, "GATHERS": gathers}
        yield f"three rotations, gathers {gathers}", triton_shared._shared_kernel, TYPES[dtype], constants, tile
    tile = tile_of("delta_grad", size, dtype)
    own |= {"ROWS": tile.rows, "LEVELS": 1}
    for atomic in (True, False):
        constants = {**own, "WIDTH": tile.width, "ATOMIC": atomic}
        yield f"delta_grad, atomic {atomic}", triton_rotate._delta_grad_kernel, TYPES[dtype], constants, tile
        constants = {**own, "WIDTH": triton_shared.narrow(size, tile), "COUNT": 3, "ATOMIC": atomic}
        yield f"three delta_grads, atomic {atomic}", triton_shared._delta_grads_kernel, TYPES[dtype], constants, tile


def _source(kernel: Any, pointer: str, constants: dict[str, Any]) -> ASTSource:
    """As Triton would specialise for sizes and strides that are multiples of 16, which models' are."""
    sums = "ATOMIC" in constants
    kinds = {
        name: "constexpr" if name in constants
        else "*fp32" if sums and name == "out_ptr"
        else pointer if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
    }  # fmt: skip
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
