"""Adapters from hub repositories, through huggingface_hub's own client and a server on this machine."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from huggingface_hub import constants

from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.files import FILE_NAME
from tests.helpers.local_hub import serve
from tests.library.support import assert_loading_refused, distance, draw
from tests.peers import peft_oft


@pytest.fixture
def hub(monkeypatch, tmp_path, plain):
    """Repository someone/mug with our file on main, and another one in a folder of its branch v2."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # tests/conftest.py has put the client offline
    main, branch = tmp_path / "main", tmp_path / "v2" / "deep"
    main.mkdir()
    branch.mkdir(parents=True)
    shutil.copy(plain, main / FILE_NAME)
    shutil.copy(plain, branch / "step.safetensors")
    with serve() as hub:
        hub.repositories |= {("someone/mug", "main"): main, ("someone/mug", "v2"): tmp_path / "v2"}
        yield hub


def test_a_repository_is_found_by_its_name_alone(pipe, hub, tmp_path, base_pipe):
    loaded = load_oft_weights(pipe, "someone/mug", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert loaded.name == "mug"
    assert distance(draw(pipe), draw(base_pipe)) > 0.01


def test_a_revision_and_a_folder_in_it(pipe, hub, tmp_path):
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "revision": "v2"}
    assert_loading_refused(pipe, "someone/mug", "someone/mug", FILE_NAME, "no .safetensors file", **where)
    assert load_oft_weights(pipe, "someone/mug", subfolder="deep", **where).name == "step"  # the only one there
    assert_loading_refused(
        pipe, "someone/mug", "someone/mug", "main.safetensors", weight_name="main.safetensors", **where
    )
    assert_loading_refused(pipe, "someone/mug", "someone/mug", **{**where, "revision": "v3"})


def test_what_was_downloaded_is_used_without_the_hub(pipe, hub, tmp_path):
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    load_oft_weights(pipe, "someone/mug", adapter_name="a", **where)
    asked = len(hub.requests)
    load_oft_weights(pipe, "someone/mug", adapter_name="b", local_files_only=True, **where)
    assert len(hub.requests) == asked
    load_oft_weights(pipe, "someone/mug", adapter_name="c", **where)
    assert [r.split()[0] for r in hub.requests[asked:]] == ["HEAD"]  # asked whether it is still the same, no more
    load_oft_weights(pipe, "someone/mug", adapter_name="d", force_download=True, **where)
    assert hub.requests[-1].startswith("GET")


def test_a_private_repository_wants_its_token(pipe, hub, tmp_path):
    hub.private.add("someone/mug")
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    assert_loading_refused(pipe, "someone/mug", "someone/mug", token=False, **where)
    assert_loading_refused(pipe, "someone/mug", "someone/mug", token="wrong", **where)
    assert load_oft_weights(pipe, "someone/mug", token="secret", **where).matched > 0


def test_repositories_of_peft_and_of_diffusers(pipe, hub, tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = tuple(pipe.unet.get_submodule(layer).weight.shape)
    folder = peft_oft.write_peft(tmp_path / "peft", {layer: shape})
    hub.repositories["someone/peft", "main"] = folder
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "component": "unet"}
    loaded = load_oft_weights(pipe, "someone/peft", **where)
    assert (loaded.format, loaded.matched, loaded.name) == ("PEFT", 1, "peft")
    (folder / "another.safetensors").write_bytes(b"")
    assert load_oft_weights(pipe, "someone/peft", adapter_name="again", **where).format == "PEFT"
    (folder / "adapter_config.json").unlink()
    assert_loading_refused(
        pipe, "someone/peft", "someone/peft", "adapter_model.safetensors, another.safetensors", **where
    )


@pytest.mark.parametrize("inside", [None, "deep"])
def test_a_repository_with_a_folder_of_peft_for_each_component(pipe, hub, tmp_path, inside):
    folder = tmp_path / "repository"
    layers = {
        "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
    }
    for part, layer in layers.items():
        shape = tuple(getattr(pipe, part).get_submodule(layer.removeprefix("text_model.")).weight.shape)
        peft_oft.write_peft((folder / inside if inside else folder) / part, {layer: shape}, block_size=8)
    hub.repositories["someone/peft", "main"] = folder
    where: dict[str, Any] = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "subfolder": inside}
    for offline in (False, True):
        loaded = load_oft_weights(pipe, "someone/peft", local_files_only=offline, **where)
        assert (loaded.name, loaded.matched, set(loaded.components)) == ("peft", 2, set(layers))
        unload_oft_weights(pipe)


@pytest.mark.parametrize("how", ["asked for", "by the environment"])
def test_what_was_downloaded_is_found_offline_whatever_its_name(pipe, hub, tmp_path, monkeypatch, how):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = tuple(pipe.unet.get_submodule(layer).weight.shape)
    hub.repositories["someone/peft", "main"] = peft_oft.write_peft(tmp_path / "peft", {layer: shape})
    cases: list[tuple[str, Any]] = [
        ("someone/peft", {"component": "unet"}),
        ("someone/mug", {"revision": "v2", "subfolder": "deep"}),
    ]
    for repository, where in cases:
        load_oft_weights(pipe, repository, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", **where)
    unload_oft_weights(pipe)
    asked = len(hub.requests)
    offline: Any = {}
    if how == "asked for":
        offline = {"local_files_only": True}
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for repository, where in cases:
        assert load_oft_weights(pipe, repository, cache_dir=tmp_path / "cache", **where, **offline).matched > 0
    assert len(hub.requests) == asked


def test_a_repository_that_is_not_there(pipe, hub, tmp_path):
    assert_loading_refused(pipe, "someone/mugs", "someone/mugs", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
