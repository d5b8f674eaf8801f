"""A folder of PEFT's folders, one per component, as `convert --to peft` writes it and trainers leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from oft_diffusion.files import FILE_NAME, AdapterFile
from oft_diffusion.formats.source import Imported
from oft_diffusion.formats.writing import CONFIG_NAME, WEIGHTS_NAME
from oft_diffusion.metadata import AdapterMetadata


def is_pefts(folder: Path) -> bool:
    """Whether PEFT's two files are what a folder holds."""
    try:
        return (folder / CONFIG_NAME).is_file() and not (folder / FILE_NAME).is_file()
    except OSError:  # a name too long, a folder that may not be searched: resolving it tells
        return False


def component_folders(folder: Path) -> dict[str, Path]:
    """By component, the tensors' files in PEFT's folders within a folder; none where it holds an adapter itself."""
    try:
        if not folder.is_dir() or (folder / CONFIG_NAME).exists() or any(folder.glob("*.safetensors")):
            return {}
        return {path.name: path / WEIGHTS_NAME for path in sorted(folder.iterdir()) if is_pefts(path)}
    except OSError:
        return {}


def joined(folder: Path, imported: Mapping[str, Imported]) -> Imported:
    """Files of one component each as one adapter."""
    files: Sequence[AdapterFile] = [one.file for one in imported.values()]
    first = next(iter(imported.values()))
    metadata = AdapterMetadata(
        components={part: config for file in files for part, config in file.metadata.components.items()},
        base={"components": {part: c for file in files for part, c in file.metadata.base["components"].items()}},
        training=first.file.metadata.training,
        mode=first.mode,
    )
    components = {part: state for file in files for part, state in file.components.items()}
    notes = tuple(note for one in imported.values() for note in one.notes)
    unmatched = tuple(f"{part}.{key}" for part, one in imported.items() for key in one.unmatched)
    return replace(first, file=AdapterFile(folder, components, metadata), notes=notes, unmatched=unmatched)
