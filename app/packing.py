"""A training as files to take to another machine: its settings alone, or with the pictures."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

from oft_diffusion.training import TrainConfig

from .runs import CONFIG, PHOTOS

ZIP = "training.zip"
COMMAND = f"oft-diffusion train --config {CONFIG}"


def settings(config: TrainConfig, model: str) -> str:
    """TOML that trains the same elsewhere, in a folder with the pictures.

    Args:
        config: of the run.
        model: its base's name on other machines, where it has one.
    """
    moved = replace(config, model=model, instance_dir=PHOTOS, output_dir="run", class_dir=None)
    lines = [
        f"# In the folder that this lies in:  {COMMAND}",
        f"# The pictures, each with its caption in a .txt of its name, are in the folder {PHOTOS} beside it.",
    ]
    if Path(model).exists():
        lines.append(
            "# The model is a place on the machine that this was packed on: name the one on yours, or --model."
        )
    return "\n".join([*lines, moved.to_toml()])


def settings_file(folder: Path, text: str) -> Path:
    """`settings` as a file."""
    path = folder / CONFIG
    path.write_text(text, encoding="utf-8")
    return path


def packed(folder: Path, text: str, pictures: Path) -> Path:
    """`settings`, pictures and captions as a ZIP."""
    with zipfile.ZipFile(folder / ZIP, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, text)
        for path in sorted(pictures.iterdir()):
            archive.write(path, f"{PHOTOS}/{path.name}")
    return folder / ZIP
