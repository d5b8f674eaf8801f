"""Every denoiser of the installed diffusers, every text encoder of its pipelines: what is adapted, and what is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from oft_diffusion import targets as targets_module
from oft_diffusion.architectures import DENOISERS
from oft_diffusion.targets import find_targets
from oft_diffusion.text_encoders import TEXT_ENCODERS
from tests.helpers import coverage

# Parts of names that no target may have, whatever the patterns say.
FORBIDDEN = re.compile(
    r"norm|emb(ed)?(der|ding)|(^|[._])mod($|[._])|modulation|adaln|vision|(^|\.)visual\.|lm_head|(^|\.)head\.|conv|"
    r"timestep|time_|caption|router|(^|\.)experts?\.|(^|\.)(context|token)_refiner|refiner_blocks|text_projection|"
    r"final_|img_mlp\.gate$|pooler",
    re.IGNORECASE,
)

# Classes with convolutions in lists that are no repeated blocks: StableCascade's are between its levels.
CONVOLUTIONS_MISSED = {"StableCascadeUNet"}

# Classes with attention whose names do not tell: a camera branch, a list of attentions called an adapter.
TELLING_NAMES_MISS = {"SanaWMTransformer3DModel", "WanAnimateTransformer3DModel"}


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("name", "variant"), coverage.builds())
def test_a_class_is_adapted_as_the_table_says(name: str, variant: str) -> None:
    model = coverage.build(name, variant)
    now = coverage.measure(name, variant, model)
    before = [line for line in coverage.committed() if (line.name, line.variant) == (name, variant)]
    told = [coverage.to_csv(lines).splitlines() for lines in (now, before)]
    assert told[0] == told[1], f"if this is meant, {coverage.COMMAND} writes the table again"

    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    everything = {t.name: t.module for t in find_targets(model, "all-linear")}
    with_conv = {t.name: t.module for t in find_targets(model, "all-linear+conv")}
    assert everything.items() <= with_conv.items()
    for target in with_conv.keys() - everything.keys():
        convolution = with_conv[target]
        assert isinstance(convolution, nn.Conv2d), target
        assert convolution.groups == 1, target
        assert is_in_block(target, lists), f"{target} is in no list of blocks"
    if type(model).__name__ not in CONVOLUTIONS_MISSED:
        blocks = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and is_in_block(n, lists)}
        assert {n for n, m in blocks.items() if m.groups == 1} <= with_conv.keys()
    attention = {t.name for t in find_targets(model, "attention")}
    assert attention <= {*everything}
    for target, module in everything.items():
        assert type(module) is nn.Linear, target
        assert not FORBIDDEN.search(target), target
        assert is_in_block(target, lists), f"{target} is in no list of blocks"
    row = targets_module.ARCHITECTURES[name]
    for layer, is_projection in attention_layers(model, lists):
        if any(re.match(pattern, layer) for pattern in coverage.LEFT_OUT):
            assert layer not in everything
        elif layer not in everything:
            place = row.block_of(layer)
            assert place is not None, f"{layer} is part of an attention, and no target"
            assert row.is_idle(layer.removeprefix(f"{place[0]}.{place[1]}.")), f"{layer} is no target"
        elif is_projection:
            assert layer in attention, f"{layer} is a projection of an attention, and not in its set"


def is_in_block(layer: str, lists: set[str]) -> bool:
    """Whether a list of blocks is around it: not just the list of the steps of one layer."""
    parts = layer.split(".")
    return any(".".join(parts[:end]) in lists for end in range(1, len(parts) - 1))


def attention_layers(model: nn.Module, lists: set[str]) -> Iterator[tuple[str, bool]]:
    """Linear layers of attention modules in lists of blocks, by class names; and whether it is a direct child."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or not is_in_block(name, lists) or "norm" in name:
            continue
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            kind = type(modules[".".join(parts[:end])]).__name__
            if re.search("Attention|Attn", kind) and not re.search("Block|Layer", kind):
                yield name, end == len(parts) - 1 or parts[end].startswith("to_out")
                break


def test_every_exported_class_has_a_row_or_a_reason() -> None:
    classes = {*coverage.denoiser_classes(), *coverage.text_encoder_classes()}
    known = {*DENOISERS, *TEXT_ENCODERS, *coverage.WITHOUT_ROW}
    assert classes - known == set(), "new classes: give each a row (oft_diffusion/architectures.py) or say why not"
    assert known - classes == set(), "these are gone from the installed libraries"
    assert not {*coverage.WITHOUT_ROW} & {*DENOISERS, *TEXT_ENCODERS}


def test_the_table_and_its_page_are_of_one_make() -> None:
    lines = coverage.committed()
    assert list(dict.fromkeys((line.name, line.variant) for line in lines)) == coverage.builds()
    assert coverage.PAGE.read_text(encoding="utf-8") == coverage.to_page(lines)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", [*DENOISERS, *TEXT_ENCODERS])
def test_the_rule_for_unknown_classes_agrees_with_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may miss what its names do not tell, but takes nothing that the row does not."""
    variant = next(iter(coverage.BUILDS.get(name, {"": {}})))
    model: Any = coverage.build(name, variant)
    wanted = {t.name for t in find_targets(model, "attention")}
    everything = {t.name for t in find_targets(model, "all-linear")}
    with_conv = {t.name for t in find_targets(model, "all-linear+conv")}
    monkeypatch.setattr(targets_module, "ARCHITECTURES", {})
    with pytest.warns(UserWarning, match=f"{name} has no row"):
        guessed = {t.name for t in find_targets(model, "attention")}
    row = DENOISERS.get(name) or TEXT_ENCODERS[name]
    idle = {n for n in guessed if (at := row.block_of(n)) and row.is_idle(n.removeprefix(f"{at[0]}.{at[1]}."))}
    left_out = {n for n in guessed if any(re.match(pattern, n) for pattern in coverage.LEFT_OUT)}
    assert guessed - everything - idle - left_out == set()
    with pytest.warns(UserWarning, match=f"{name} has no row"):
        guessed_conv = {t.name for t in find_targets(model, "all-linear+conv") if isinstance(t.module, nn.Conv2d)}
    assert name in CONVOLUTIONS_MISSED or guessed_conv <= with_conv
    if name not in TELLING_NAMES_MISS:
        assert guessed - left_out - idle == wanted - idle
