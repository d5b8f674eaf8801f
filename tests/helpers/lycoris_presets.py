"""LyCORIS's presets, which are its class's and so would stay for all tests that follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def preset(network: Any, told: Mapping[str, Any]) -> Iterator[None]:
    """Make networks of this class of these layers, for as long as the block lasts."""
    before = {name: value for name, value in vars(network).items() if name.isupper()}
    network.apply_preset(dict(told))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(network, name, value)
