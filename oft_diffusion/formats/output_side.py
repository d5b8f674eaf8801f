"""Files of the first OFT, which rotates outputs: sd-scripts `networks.oft` and `oft_flux`, LyCORIS diag-oft.

Full matrices B per block of output rows: `Q = B - B^T`, `R = C(Q)` exactly, merged `R^T W`, which is our output side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.formats.source import Match, Source
from oft_diffusion.inject import KEY_SUFFIX, SCALE_SUFFIX, noted_block_size
from oft_diffusion.rotation import pack
from oft_diffusion.targets import output_width

_SUFFIXES = ("oft_blocks", "oft_diag", "alpha", "rescale")


def read_output_side(source: Source, matches: list[Match]) -> dict[str, tuple[OFTConfig, dict[str, Tensor]]]:
    """Per component, its settings and its tensors as ours.

    Raises:
        AdapterFileError: BOFT; shapes that do not fill a layer's outputs; blocks that lie across two layers of a fused
            weight; a matrix that is no rotation.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for match in matches:
        if strange := [name for name in match.tensors if not name.startswith(_SUFFIXES)]:
            raise _bad(source, match, f"{strange[0]} beside rotations of its outputs", "settings of one tool")
        state, scales = states.setdefault(match.meaning.component, {}), _scales(source, match)
        for layer, q in _read_match(source, match):
            if layer + KEY_SUFFIX in state:
                raise _bad(source, match, f"{layer} for the second time", "one rotation per layer")
            state[layer + KEY_SUFFIX] = pack(q).float()
            if layer in scales:
                state[layer + SCALE_SUFFIX] = scales[layer].view(len(q), -1).float()
    return {part: (OFTConfig(block_size=noted_block_size(state), targets=".*", side="output"), state)
            for part, state in states.items()}  # fmt: skip


def notes_of_training(source: Source, matches: list[Match]) -> tuple[str, ...]:
    """What a user should know of how the file was trained: in LyCORIS's bypass mode, biases turn with the outputs."""
    biased = [match.key for match in matches if any(getattr(m, "bias", None) is not None for m in match.modules)]
    if not biased or not any(_bypasses(source.arguments(entry)) for entry in ("lycoris_config", "ss_network_args")):
        return ()
    note = (
        f"{source.name} was trained in bypass_mode, in which LyCORIS rotates the biases of {len(biased)} layers, too "
        f"({biased[0]}): they stay here, as where LyCORIS merges the file, so pictures differ from those in training"
    )
    return (note,)


def _bypasses(told: dict[str, Any]) -> bool:
    """Whether settings, or those of some layers inside them, ask for `bypass_mode`."""
    queue: list[Any] = [told]
    for part in queue:  # which grows; settings may be nested deep
        if isinstance(part, dict):
            if str(part.get("bypass_mode", "")).lower() in ("true", "1", "yes"):
                return True
            queue += part.values()
    return False


def _read_match(source: Source, match: Match) -> list[tuple[str, Tensor]]:
    """Per leaf, its layer's `Q (r, b, b)`, in float64."""
    leaves, tensors = match.meaning.leaves, match.tensors
    outputs = [output_width(module) for module in match.modules]
    rotations = [name for name in tensors if name.startswith(("oft_blocks", "oft_diag"))]
    if len(rotations) > 1 and not all(name.startswith("oft_blocks.") for name in rotations):
        raise _bad(source, match, f"both {rotations[0]} and {rotations[1]}", "one of them")
    if "oft_diag" in tensors:
        return _leaves(source, match, _of_rotation(source, match, tensors["oft_diag"], sum(outputs)))
    if "oft_blocks" in tensors:
        return _leaves(source, match, _skew(source, match, tensors["oft_blocks"], sum(outputs)))
    splits = [tensors.get(f"oft_blocks.{number}") for number in range(len(leaves))]
    numbers = sum(name.startswith("oft_blocks.") for name in tensors)
    if None in splits or numbers != len(leaves):
        raise _bad(source, match, f"{numbers} sets of blocks", f"one for each of {', '.join(match.meaning.layers)}")
    found = []
    for leaf, rows, blocks in zip(leaves, outputs, splits, strict=True):
        assert blocks is not None
        found.append((leaf.layer, _skew(source, match, blocks, rows)))
    return found


def _check_square(source: Source, match: Match, stored: Tensor, outputs: int) -> None:
    """Before anything is computed: a matrix as large as the file costs many times as much."""
    shape = tuple(stored.shape)
    if stored.dim() != 3 or shape[1] != shape[2] or shape[1] < 2 or not stored.is_floating_point():
        raise _bad(source, match, f"blocks of shape {shape}, {stored.dtype}", "square matrices")
    if shape[0] * shape[1] != outputs:
        raise _bad(source, match, f"{shape[0]} blocks of {shape[1]}", f"blocks that fill its {outputs} outputs")


def _skew(source: Source, match: Match, blocks: Tensor, outputs: int) -> Tensor:
    if blocks.dim() == 4:
        raise AdapterFileError(
            f"{source.name} is BOFT, as the four axes of {match.key}.oft_blocks tell, which has no counterpart here",
            expected="OFT: blocks of three axes",
            fix="use it in the tool that wrote it, or merge it into a model there",
        )
    _check_square(source, match, blocks, outputs)
    q = blocks.double() - blocks.double().mT
    # Not a scale: a bound on all blocks together. LyCORIS writes 0 where there is none, sd-scripts always has one.
    alpha, always = match.tensors.get("alpha"), source.header.get("ss_network_module", "").startswith("networks.oft")
    if (alpha is None and always) or (alpha is not None and alpha.numel() != 1):
        raise _bad(source, match, "no alpha" if alpha is None else f"alpha of shape {tuple(alpha.shape)}", "one number")
    bound = 0.0 if alpha is None else float(alpha) * outputs
    if bound > 0 or always:
        q = q * min(1.0, bound / max(float(q.norm()), 1e-12))
    return q


def _of_rotation(source: Source, match: Match, stored: Tensor, outputs: int) -> Tensor:
    """`Q` of rotations that are stored themselves, as LyCORIS did in 2023."""
    _check_square(source, match, stored, outputs)
    r, identity = stored.double(), torch.eye(stored.shape[1], dtype=torch.float64)
    error = float((r @ r.mT - identity).abs().max())
    allowed = 1e-4 if stored.dtype in (torch.float32, torch.float64) else 2e-2  # rounded when it was saved
    if error > allowed or float(torch.linalg.eigvals(r).real.min()) < -0.999:
        raise _bad(
            source, match, f"matrices that are no rotations (orthogonality error {error:.2g})",
            "rotations, which some builds of LyCORIS of 2023 did not store under this name",
        )  # fmt: skip
    q = torch.linalg.solve(r + identity, r - identity)
    return (q - q.mT) / 2


def _leaves(source: Source, match: Match, q: Tensor) -> list[tuple[str, Tensor]]:
    """Each leaf's blocks of a weight that several layers share: rotations act on rows, so leaves must not cut one."""
    size = q.shape[1]
    found = []
    for leaf in match.meaning.leaves:
        rows = leaf.take(torch.arange(len(q) * size).unsqueeze(1)).flatten()
        blocks = rows.view(-1, size) // size if len(rows) % size == 0 else None
        aligned = blocks is not None and torch.equal(blocks[:, :1] * size + torch.arange(size), rows.view(-1, size))
        if blocks is None or not aligned:
            raise _bad(source, match, f"blocks of {size} across {leaf.layer} and another layer", "blocks within each")
        found.append((leaf.layer, q[blocks[:, 0]]))
    return found


def _scales(source: Source, match: Match) -> dict[str, Tensor]:
    stored = match.tensors.get("rescale")
    if stored is None:
        return {}
    if stored.numel() != sum(output_width(module) for module in match.modules) or not stored.is_floating_point():
        raise _bad(source, match, f"rescale of shape {tuple(stored.shape)}", "one factor per output")
    return {leaf.layer: leaf.take(stored.double().reshape(-1, 1)).flatten() for leaf in match.meaning.leaves}


def _bad(source: Source, match: Match, found: str, expected: str) -> AdapterFileError:
    return AdapterFileError(
        f"{source.name} has for {match.key} {found}",
        expected=expected,
        fix="load it onto the model that it was trained on, or get the file again",
    )
