"""The page about quantized bases shows what is counted of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.full_size import FULL_SIZE
from benchmarks.quantized_bytes import HEAD, rows

PAGE = (Path(__file__).parent.parent / "docs" / "quantization.md").read_text(encoding="utf-8")


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_page_shows_what_is_counted(name: str) -> None:
    assert HEAD in PAGE
    for row in rows(name):
        assert row in PAGE
