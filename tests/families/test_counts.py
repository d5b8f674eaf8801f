"""What is counted without weights is what a run then has, in every family and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from oft_diffusion.inject import inject_oft
from oft_diffusion.text_encoders import last_hidden_state
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.count import bytes_of, count
from oft_diffusion.training.families import FAMILIES
from oft_diffusion.training.find import find_base
from oft_diffusion.training.precision import DTYPES
from oft_diffusion.training.skeleton import adapted
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import kind_of


@pytest.mark.thinned(5)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_counts_are_those_of_the_loaded_base(name: str, precision: str, folder_of: Callable[[str], Path]) -> None:
    base = find_base(str(folder_of(name)))
    config = TrainConfig.from_dict({
        "model": str(folder_of(name)), "instance_dir": "photos", "trigger": "sks", "class_word": "mug",
        "output_dir": "run", "block_size": 4, "text_encoder": True, "mixed_precision": precision,
    })  # fmt: skip
    family = FAMILIES[kind_of(name)].load(base, DTYPES[precision])
    modules = [family.module(part) for part in base.modules]
    found = count(config, base)
    assert found.base == sum(p.numel() for module in modules for p in module.parameters())
    assert found.base_bytes == bytes_of(modules)
    banks = [
        inject_oft(family.module(part), settings, hidden_state=last_hidden_state(base.pipeline, part, 0))
        for part, settings in adapted(config, base).items()
    ]
    assert found.trained == found.saved == sum(p.numel() for bank in banks for p in bank.parameters())
