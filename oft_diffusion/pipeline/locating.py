"""Where an adapter's file is: on disk, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oft_diffusion.errors import AdapterFileError, first_line
from oft_diffusion.files import FILE_NAME, resolve_adapter_path
from oft_diffusion.formats.folders import component_folders, is_pefts
from oft_diffusion.formats.writing import CONFIG_NAME, WEIGHTS_NAME

_HUB_OPTIONS = (
    "cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "library_name", "library_version",
    "local_dir", "local_files_only", "repo_type", "revision", "subfolder", "token", "user_agent",
)  # fmt: skip


def locate(source: str | Path, weight_name: str | None, hub_options: Mapping[str, Any]) -> tuple[Path, str]:
    """The local path of an adapter's tensors, and what to call it: the folder's, the file's or the repository's name.

    PEFT's two files lie in one folder; its path is then that of the tensors. Where there is such a folder for each
    component, the path is that of the folder around them.

    Raises:
        AdapterFileError: there is none, or it cannot be had.
        TypeError: an option is none of `huggingface_hub.hf_hub_download`'s.
    """
    if unknown := sorted(set(hub_options) - set(_HUB_OPTIONS)):
        raise TypeError(f"load_oft_weights() got an unexpected keyword argument {unknown[0]!r}")
    if not isinstance(source, (str, Path)):
        raise AdapterFileError(
            f"a {type(source).__name__} is no place of an adapter",
            expected="a path to a .safetensors file or its folder, or a hub repository id",
            fix="save the adapter with save_oft_weights, and pass that path",
        )
    local = Path(source)
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w.\-]{1,96}/[\w.\-]{1,96}", source) is not None
    if not is_hub_id or local.suffix == ".safetensors" or local.exists():
        if subfolder := hub_options.get("subfolder"):
            local = local / subfolder
        if weight_name is None and component_folders(local):
            return local, local.absolute().name
        path = resolve_adapter_path(local, WEIGHTS_NAME if weight_name is None and is_pefts(local) else weight_name)
    else:
        path = _download(str(source), weight_name, hub_options)
        local = Path(source)
        if path.is_dir() or path.name in (FILE_NAME, WEIGHTS_NAME):
            return path, local.name
    return path, path.absolute().parent.name if path.name in (FILE_NAME, WEIGHTS_NAME) else path.stem


def _download(repository: str, weight_name: str | None, hub_options: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = weight_name or FILE_NAME
    try:
        try:
            return Path(hf_hub_download(repository, name, **hub_options))
        except EntryNotFoundError as error:
            if weight_name is not None:
                raise
            is_offline = isinstance(error, LocalEntryNotFoundError)
            found = (_cached_files if is_offline else _hub_files)(repository, hub_options)
            if folders := _folders(found):
                return _download_folders(repository, folders, hub_options)
            name = _only_adapter(repository, found)
            if name == WEIGHTS_NAME:
                hf_hub_download(repository, CONFIG_NAME, **hub_options)
            return Path(hf_hub_download(repository, name, **hub_options))
    except AdapterFileError:
        raise
    except Exception as error:  # its client raises those of several libraries
        raise AdapterFileError(
            f"{repository!r} is no local path, and {name} could not be had from that hub repository "
            f"({first_line(error)})",
            expected="a local file or folder, or a reachable repository that holds the file",
            fix="check the name, weight_name, revision and token, or download the file first",
        ) from error


def _folders(names: Sequence[str]) -> list[str]:
    """Of a repository with no adapter at its top, the folders that hold one of PEFT's each."""
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return []
    found = (name.split("/") for name in names)
    return sorted(parts[0] for parts in found if len(parts) == 2 and parts[1] == CONFIG_NAME)


def _download_folders(repository: str, folders: Sequence[str], hub_options: Mapping[str, Any]) -> Path:
    """PEFT's two files of each folder; the path of the folder around them."""
    from huggingface_hub import hf_hub_download

    inside = hub_options.get("subfolder")
    others = {key: value for key, value in hub_options.items() if key != "subfolder"}
    for folder in folders:
        subfolder = f"{inside.strip('/')}/{folder}" if inside else folder
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = Path(hf_hub_download(repository, name, subfolder=subfolder, **others))
    return path.parent.parent


def _hub_files(repository: str, hub_options: Mapping[str, Any]) -> list[str]:
    """Names in a repository's folder."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub_options.get("endpoint"), token=hub_options.get("token"))
    where = {key: hub_options[key] for key in ("revision", "repo_type") if key in hub_options}
    folder = f"{hub_options['subfolder'].strip('/')}/" if hub_options.get("subfolder") else ""
    return [n.removeprefix(folder) for n in api.list_repo_files(repository, **where) if n.startswith(folder)]


def _cached_files(repository: str, hub_options: Mapping[str, Any]) -> list[str]:
    """Names in what was downloaded of a repository's folder."""
    from huggingface_hub import snapshot_download

    where = {key: hub_options[key] for key in ("revision", "repo_type", "cache_dir") if key in hub_options}
    folder = Path(snapshot_download(repository, local_files_only=True, **where)) / (hub_options.get("subfolder") or "")
    return [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]


def _only_adapter(repository: str, names: Sequence[str]) -> str:
    """The file to take where there is none of ours: PEFT's, or the only one, as diffusers guesses."""
    there = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if WEIGHTS_NAME in there and CONFIG_NAME in names:
        return WEIGHTS_NAME
    if len(there) != 1:
        raise AdapterFileError(
            f"hub repository {repository!r} holds no {FILE_NAME}",
            expected=f"an adapter file; found {', '.join(there) or 'no .safetensors file'}",
            fix="name the file with weight_name, and its folder with subfolder",
        )
    return there[0]
