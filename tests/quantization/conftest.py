from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_sd import draw_pictures, write_tiny_sd


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD 1.x folder, of layers with whole blocks of 32 and of 64 to a row; do not write into it."""
    return write_tiny_sd(tmp_path_factory.mktemp("tiny_sd"), width=96)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three instance images; do not write into it."""
    return draw_pictures(tmp_path_factory.mktemp("instance"))
