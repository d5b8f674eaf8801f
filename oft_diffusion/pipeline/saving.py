"""Adapters of a pipeline as files, and on the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import LocalTokenNotFoundError
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterFileError, ConfigError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.formats.components import modules_of
from oft_diffusion.hooks import bank_of, unwrap
from oft_diffusion.images import image_files
from oft_diffusion.inject import KEY_SUFFIX, oft_state_dict
from oft_diffusion.metadata import AdapterMetadata, public_name
from oft_diffusion.offload import is_on_disk
from oft_diffusion.pipeline.card import (
    CARD_NAME,
    SampleImage,
    adapter_in,
    check_card,
    check_replaceable,
    is_untouched,
    read_card,
    read_samples,
    refuse_other_name,
    write_model_card,
)
from oft_diffusion.pipeline.escaping import line, without_local_paths
from oft_diffusion.pipeline.state import require_banks
from oft_diffusion.plan import make_active
from oft_diffusion.proof import fingerprint, layer_probes, weight_probes, weights_of


def save_oft_weights(
    pipe: DiffusionPipeline,
    path: str | Path,
    adapter_name: str,
    metadata: AdapterMetadata | None = None,
    *,
    recommended_strength: float | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    license: str | None = None,  # noqa: A002 - what the hub calls it
    sample_images: Iterable[SampleImage] = (),
    commit_message: str | None = None,
) -> Path:
    """Save an adapter, all components in one file; on the hub, too, if asked, with a model card.

    Args:
        pipe: a pipeline with the adapter.
        path: a `.safetensors` file, or a folder, in which it is called `oft_adapter.safetensors`. For the hub, a
            folder: what is uploaded stays in it.
        adapter_name: which.
        metadata: replaces what the adapter was loaded with (trigger, training settings, ...). Settings of components,
            the base and the mode of strengths are filled in here. Of absolute paths in it, the last part is kept.
        recommended_strength: noted in the file; what the metadata says if None, which is 1 where it says nothing.
        push_to_hub: the repository, "user/name"; made if there is none. See `push_oft_weights`.
        private: whether a new repository is.
        token: for the hub; that of `hf auth login` if None.
        license: for the card, see `write_model_card`.
        sample_images: likewise.
        commit_message: of the upload.

    Returns:
        The file's path.

    Raises:
        AdapterError: there is no such adapter, or the strength is no finite number.
        AdapterFileError: the file or the card cannot be written, or not uploaded; then all is on disk.
        ConfigError: `push_to_hub` names no repository, or something is told that only the hub has a use for.
        DataError: a sample image cannot be read.
    """
    banks = {p: b for p, b in require_banks(pipe, (adapter_name,)).items() if adapter_name in b.adapters}
    notes = (bank.metadata[adapter_name].metadata for bank in banks.values() if adapter_name in bank.metadata)
    loaded = next(notes, None) or AdapterMetadata(components={})
    known = metadata or loaded
    told = known.strength if recommended_strength is None else recommended_strength
    [active] = make_active([adapter_name], [told], "rotation")
    samples = read_samples(sample_images)
    if push_to_hub is not None:
        _check_push(Path(path), push_to_hub, license)
    else:
        _refuse_idle(
            private=private, token=token, license=license, sample_images=samples or None, commit_message=commit_message
        )
    parts = {part: module for part, module in modules_of(pipe).items() if part in banks}
    states = {part: oft_state_dict(module, adapter_name) for part, module in parts.items()}
    configs = {part: bank.adapters[adapter_name].config for part, bank in banks.items()}
    filled = replace(
        known,
        components=configs,
        base=without_local_paths(known.base),
        training=without_local_paths(known.training),
        strength=active.strength,
        mode=loaded.mode,
    )
    if not known.base:
        name = getattr(pipe.config, "_name_or_path", "")
        base = describe_base(name, parts) | {"pipeline": type(pipe).__name__}
        filled = replace(filled, base=base, probes=probe_layers(parts, states, configs))
    saved = save_adapter_file(path, states, filled)
    if push_to_hub is not None:
        write_model_card(saved, push_to_hub, license=license, sample_images=samples)
        push_oft_weights(saved, push_to_hub, private=private, token=token, commit_message=commit_message)
    return saved


def push_oft_weights(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload an adapter with its model card and the pictures that the card shows.

    A card that was edited is uploaded as it is; where there is none, `write_model_card` writes one. Nothing else in the
    folder is uploaded, and nothing is deleted in the repository; a card in it is replaced.

    Args:
        path: a folder with an `oft_adapter.safetensors`.
        repo_id: the repository, "user/name"; made if there is none.
        private: whether a new repository is; if None, as its owner's are.
        token: for the hub; that of `hf auth login` if None.
        commit_message: of the upload.

    Returns:
        The repository's address.

    Raises:
        AdapterFileError: the folder has no adapter, or another one's card; or the hub does not take it.
        ConfigError: `repo_id` is no repository's.
    """
    check_card(repo_id, None)
    file = adapter_in(path)
    folder = file.parent
    if read_card(folder) is None:
        write_model_card(file, repo_id)
    card = read_card(folder) or ""
    if is_untouched(card) and not (f'"{repo_id}"' in card and load_adapter_file(file).metadata.sha256 in card):
        raise AdapterFileError(
            f"{folder / CARD_NAME} was written for another adapter or another repository than {repo_id!r}",
            expected="its own card",
            fix="write it anew with write_model_card",
        )
    shown = [
        p.name for p in image_files(folder, "path") if re.search(rf"(?<![\w.-]){re.escape(p.name)}(?![\w-])", card)
    ]
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in (file.name, CARD_NAME, *shown)],
            commit_message=commit_message or "Upload OFT adapter",
        )
    except Exception as error:  # its client raises those of several libraries
        raise _not_pushed(folder, repo_id, error) from error
    return str(url)


def _not_pushed(folder: Path, repo_id: str, error: Exception) -> AdapterFileError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        step = "log in with `hf auth login`, or pass a token"
    elif status == 403:
        step = f"use a token that may write to {repo_id}"
    else:
        step = "see what it says, or wait for the network"
    return AdapterFileError(
        f"the adapter and its card are in {folder}, but {repo_id!r} on the hub did not take them "
        f"({line(error)[:300] or type(error).__name__})",
        expected="a reachable hub, and a token that may write to that repository",
        fix=f"{step}; then push_oft_weights({str(folder)!r}, {repo_id!r})",
    )


def _check_push(path: Path, repo_id: str, terms: str | None) -> None:
    """All that can be known before anything is written.

    Raises:
        AdapterFileError: the path is no folder, or has a card that must not be replaced.
        ConfigError: there is no such repository or license.
    """
    check_card(repo_id, terms)
    refuse_other_name(path)
    check_replaceable(path.parent if path.suffix == ".safetensors" else path)


def _refuse_idle(**told: object) -> None:
    if idle := [name for name, value in told.items() if value is not None]:
        raise ConfigError(
            f"{idle[0]} does nothing to a file",
            expected='push_to_hub="user/name" beside it',
            fix="leave it out, or write a card with write_model_card",
        )


def probe_layers(
    parts: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, OFTConfig]
) -> dict[str, dict[str, dict[str, float]]]:
    """`AdapterMetadata.probes` through the layers of a base, as loading onto the same base will compute them."""
    clean = {part: module for part, module in parts.items() if _is_base(module)}
    weights = {part: weights_of(module) for part, module in clean.items()}
    names = {p: [k.removesuffix(KEY_SUFFIX) for k in states[p] if k.endswith(KEY_SUFFIX)] for p in clean}
    return {
        "layers": {part: layer_probes(own, states[part], configs[part]) for part, own in weights.items()},
        "weights": {part: weight_probes(own, names[part]) for part, own in weights.items()},
    }


def describe_base(name: str, components: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What an adapter's metadata says of its base: its name, and each adapted component's class and fingerprint.

    Of a local path only the last part: adapters are shared, and where a base lay is nobody's business.
    """
    return {
        "name": public_name(name),
        "components": {part: type(unwrap(m)).__name__ for part, m in components.items()},
        "fingerprints": {part: fingerprint(m) for part, m in components.items() if _is_base(m)},
    }


def _is_base(module: nn.Module) -> bool:
    """Whether a component's tensors are the base's: nothing is merged into them, and they are not on disk."""
    bank = bank_of(module)
    return (bank is None or not bank.merged) and not is_on_disk(unwrap(module))
