"""Results as CSV files that are only ever appended to, with the hardware and the versions in every row."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from oft_diffusion import __version__

DATA = Path(__file__).parent / "data"


def environment(device: str) -> dict[str, str]:
    """On which device, and with what, a measurement is made."""
    hardware = _processor() if device == "cpu" else torch.cuda.get_device_name(device)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware,
        "threads": str(torch.get_num_threads()),
        **{name: version(name).split("+")[0] for name in ("torch", "diffusers", "transformers")},
        "oft-diffusion": __version__,  # a checkout that is only on the path is not installed
        "commit": _commit(),
    }


def append(path: Path, rows: Sequence[Mapping[str, Any]], device: str = "cpu") -> None:
    """Append rows; a new file gets a header. All rows of a file have the same columns.

    Raises:
        ValueError: the file has other columns.
    """
    complete = [{**environment(device), **row} for row in rows]
    columns = list(complete[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh and (found := _header(path)) != columns:
        raise ValueError(f"{path} has the columns {found}, not {columns}")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if fresh:
        writer.writeheader()
    writer.writerows(complete)
    with path.open("ab", buffering=0) as file:  # in one piece: whoever is stopped leaves no half row
        file.write(text.getvalue().encode())


def load(path: Path) -> list[dict[str, str]]:
    """All rows, or none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file))


def _commit() -> str:
    """Of the working tree; where tracked files beside the data differ from it, with a + and a digest of how they do.

    So what was measured of a changed tree is known to be of this one. Empty outside of git.
    """
    root = DATA.parent.parent
    alike = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv")  # whatever somebody's settings are
    try:
        found = _git(root, "rev-parse", "--short", "HEAD").decode().strip()
        changes = _git(root, "diff", *alike, "HEAD", "--", ".", f":!{DATA.relative_to(root)}")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{found}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else found


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True).stdout


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
