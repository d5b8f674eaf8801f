"""Where an adapter's file is: on disk, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oft_diffusion.errors import AdapterFileError, first_line
from oft_diffusion.files import FILE_NAME, resolve_adapter_path
from oft_diffusion.formats.writing import CONFIG_NAME, WEIGHTS_NAME

_HUB_OPTIONS = (
    "cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "library_name", "library_version",
    "local_dir", "local_files_only", "repo_type", "revision", "subfolder", "token", "user_agent",
)  # fmt: skip


def locate(source: str | Path, weight_name: str | None, hub_options: Mapping[str, Any]) -> tuple[Path, str]:
    """The local path of an adapter's tensors, and what to call it: the folder's, the file's or the repository's name.

    PEFT's two files lie in one folder; its path is then that of the tensors.

    Raises:
        AdapterFileError: there is none, or it cannot be had.
        TypeError: an option is none of `huggingface_hub.hf_hub_download`'s.
    """
    if unknown := sorted(set(hub_options) - set(_HUB_OPTIONS)):
        raise TypeError(f"load_oft_weights() got an unexpected keyword argument {unknown[0]!r}")
    local = Path(source)
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w.\-]{1,96}/[\w.\-]{1,96}", source) is not None
    if not is_hub_id or local.suffix == ".safetensors" or local.exists():
        if subfolder := hub_options.get("subfolder"):
            local = local / subfolder
        path = resolve_adapter_path(local, WEIGHTS_NAME if weight_name is None and _is_pefts(local) else weight_name)
    else:
        path = _download(str(source), weight_name, hub_options)
        local = Path(source)
        if path.name in (FILE_NAME, WEIGHTS_NAME):
            return path, local.name
    return path, path.absolute().parent.name if path.name in (FILE_NAME, WEIGHTS_NAME) else path.stem


def _is_pefts(folder: Path) -> bool:
    try:
        return (folder / CONFIG_NAME).is_file() and not (folder / FILE_NAME).is_file()
    except OSError:  # a name too long, a folder that may not be searched: resolving it tells
        return False


def _download(repository: str, weight_name: str | None, hub_options: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = weight_name or FILE_NAME
    try:
        try:
            return Path(hf_hub_download(repository, name, **hub_options))
        except EntryNotFoundError as error:
            if weight_name is not None or isinstance(error, LocalEntryNotFoundError):
                raise
            hf_hub_download(repository, CONFIG_NAME, **hub_options)  # PEFT's two files
            return Path(hf_hub_download(repository, WEIGHTS_NAME, **hub_options))
    except Exception as error:  # its client raises those of several libraries
        raise AdapterFileError(
            f"{repository!r} is no local path, and {name} could not be had from that hub repository "
            f"({first_line(error)})",
            expected="a local file or folder, or a reachable repository that holds the file",
            fix="check the name, weight_name, revision and token, or download the file first",
        ) from error
