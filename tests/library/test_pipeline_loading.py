"""Where `load_oft_weights` finds a file, what it calls the adapter, and whose names it takes for the model's."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

from oft_diffusion import list_oft_adapters, load_oft_weights, oft_state_dict
from oft_diffusion.files import FILE_NAME, load_adapter_file, save_adapter_file
from oft_diffusion.inject import require_bank
from oft_diffusion.metadata import AdapterMetadata
from tests.library.support import (
    assert_loading_refused,
    copy_pipe,
    distance,
    draw,
    with_metadata,
)

# Where a file may be


def test_files_folders_and_names_of_both_kinds(pipe, plain, tmp_path, monkeypatch):
    shutil.copy(plain, tmp_path / FILE_NAME)
    shutil.copy(plain, tmp_path / "step-100.safetensors")
    (tmp_path / "sub").mkdir()
    shutil.copy(plain, tmp_path / "sub" / FILE_NAME)
    monkeypatch.chdir(tmp_path)
    expected = oft_state_dict_of(plain)
    for i, (source, options) in enumerate(
        [
            (plain, {}),
            (str(plain), {}),
            (tmp_path, {}),
            (f"{tmp_path}/", {}),
            (".", {}),
            (tmp_path, {"weight_name": "step-100.safetensors"}),
            (tmp_path, {"subfolder": "sub"}),
            ("sub", {}),
            (f"sub/{FILE_NAME}", {}),
            ("step-100.safetensors", {}),
        ]
    ):
        load_oft_weights(pipe, source, adapter_name=f"a{i}", strength=0.0, **options)  # type: ignore[arg-type]
        found = oft_state_dict(pipe.unet, f"a{i}")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def oft_state_dict_of(path):
    return load_adapter_file(path).components["unet"]


def test_default_names(pipe, mug, plain, tmp_path, monkeypatch):
    assert load_oft_weights(pipe, mug).name == "sks"
    assert load_oft_weights(pipe, mug).name == "sks_2"
    assert load_oft_weights(pipe, mug).name == "sks_3"
    assert load_oft_weights(pipe, plain).name == "plain"
    (tmp_path / "my run").mkdir()
    shutil.copy(plain, tmp_path / "my run" / FILE_NAME)
    assert load_oft_weights(pipe, tmp_path / "my run").name == "my_run"
    monkeypatch.chdir(tmp_path / "my run")
    assert load_oft_weights(pipe, ".").name == "my_run_2"
    assert load_oft_weights(pipe, FILE_NAME).name == "my_run_3"


@pytest.mark.parametrize("trigger", ["<mug>", "sks mug", "кот", "train", "pop", "__", "a.b", "-", "..", "x" * 60])
def test_any_trigger_gives_a_usable_name(pipe, plain, tmp_path, trigger):
    path = tmp_path / "mug.safetensors"
    shutil.copy(plain, path)
    name = load_oft_weights(pipe, with_metadata(path, {"trigger": trigger})).name
    assert [a.name for a in list_oft_adapters(pipe)] == [name]


@given(trigger=st.text(max_size=20))
def test_no_trigger_is_too_odd(base_pipe, tmp_path_factory, plain, trigger):
    from oft_diffusion.pipeline.loading import _default_name
    from oft_diffusion.plan import check_adapter_name

    check_adapter_name(_default_name(base_pipe, trigger))


def test_nothing_there(pipe, tmp_path, mug):
    assert_loading_refused(pipe, tmp_path, FILE_NAME, "no .safetensors file")
    assert_loading_refused(pipe, tmp_path / "none", "none", "does not exist")
    assert_loading_refused(pipe, str(tmp_path / "none"), "does not exist")
    assert_loading_refused(pipe, "none.safetensors", "does not exist")
    assert_loading_refused(pipe, "x/none.safetensors", "does not exist")
    assert_loading_refused(pipe, "a photo of sks mug", "does not exist")
    assert_loading_refused(pipe, "y" * 400, "y", "too long")
    assert_loading_refused(pipe, "y" * 300 + "/" + "z" * 300, "y", "too long")
    assert_loading_refused(pipe, mug.parent, "other.safetensors", "mug.safetensors", weight_name="other.safetensors")
    (tmp_path / "mug.pt").write_bytes(b"")
    assert_loading_refused(pipe, tmp_path / "mug.pt", "mug.pt", "pickle")


def test_a_broken_file_leaves_the_pipeline_alone(pipe, mug, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(mug.read_bytes()[:-1])
    assert_loading_refused(pipe, path, "cut.safetensors")
    load_oft_weights(pipe, mug, adapter_name="mug", strength=0.5)
    assert_loading_refused(pipe, path, "cut.safetensors")


# Names with and without transformers' `text_model.`


def renamed(path, target, add):
    """The adapter with or without the prefix in its text encoder's names."""
    file = load_adapter_file(path)
    text = {
        ("text_model." if add else "") + name.removeprefix("text_model."): tensor
        for name, tensor in file.components["text_encoder"].items()
    }
    return save_adapter_file(target, {**file.components, "text_encoder": text}, file.metadata)


def test_a_file_with_or_without_the_prefix_fits_a_text_model_without_it(pipe, plain, tmp_path):
    load_oft_weights(pipe, plain, adapter_name="plain")
    picture = draw(pipe)
    for add in (True, False):
        fresh = copy_pipe_without_adapters(pipe)
        path = renamed(plain, tmp_path / f"{add}.safetensors", add)
        assert any("text_model." in key for key in load_file(path)) == add
        load_oft_weights(fresh, path)
        assert torch.equal(draw(fresh), picture)


def copy_pipe_without_adapters(pipe):
    from oft_diffusion import unload_oft_weights

    fresh = copy_pipe(pipe)
    unload_oft_weights(fresh)
    return fresh


def test_a_file_with_or_without_the_prefix_fits_a_text_model_with_it(pipe, plain, tmp_path):
    config = pipe.text_encoder.config
    pipe.text_encoder = CLIPTextModelWithProjection(config).eval()
    assert any(name.startswith("text_model.") for name, _ in pipe.text_encoder.named_modules())
    for add in (True, False):
        path = renamed(plain, tmp_path / f"{add}.safetensors", add)
        base = load_adapter_file(path).metadata.base
        classes = {**base["components"], "text_encoder": "CLIPTextModelWithProjection"}
        with_metadata(path, {"base": {**base, "components": classes}})
        load_oft_weights(pipe, path, adapter_name=f"a{add}")
        found = oft_state_dict(pipe.text_encoder, f"a{add}")
        for name, tensor in load_adapter_file(path).components["text_encoder"].items():
            assert torch.equal(found["text_model." + name.removeprefix("text_model.")], tensor)


def test_both_spellings_in_one_file_are_assert_loading_refused(pipe, plain, tmp_path):
    file = load_adapter_file(plain)
    text = dict(file.components["text_encoder"])
    name = next(iter(text))
    text["text_model." + name.removeprefix("text_model.")] = text[name] * 2
    text[name.removeprefix("text_model.")] = text[name]
    path = save_adapter_file(tmp_path / "twice.safetensors", {"text_encoder": text}, AdapterMetadata(
        {"text_encoder": file.metadata.components["text_encoder"]}
    ))  # fmt: skip
    assert_loading_refused(pipe, path, "twice.safetensors", "twice")


# The hub


@pytest.fixture
def hub(monkeypatch, plain):
    """A hub that serves the adapter, or raises what is put into `answer`; and what it was asked."""

    class Hub:
        answer: object = plain
        asked: tuple = ()

        def download(self, repo_id, filename, **options):
            self.asked = (repo_id, filename, options)
            if isinstance(self.answer, BaseException):
                raise self.answer
            return str(self.answer)

    fake = Hub()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.download)
    return fake


def test_a_hub_id_is_downloaded_with_every_option(pipe, hub, tmp_path, plain, base_pipe):
    assert (
        load_oft_weights(pipe, "someone/mug-oft").components == load_oft_weights(copy_pipe(base_pipe), plain).components
    )
    assert hub.asked == ("someone/mug-oft", FILE_NAME, {})
    options = {
        "revision": "v2", "subfolder": "deep", "token": "t", "cache_dir": tmp_path, "local_files_only": True,
        "force_download": True,
    }  # fmt: skip
    load_oft_weights(pipe, "someone/mug-oft", weight_name="step.safetensors", adapter_name="b", strength=0.3, **options)
    assert hub.asked == ("someone/mug-oft", "step.safetensors", options)
    assert distance(draw(pipe), draw(base_pipe)) > 0.01


@pytest.mark.parametrize("source", ["someone/mug-oft", "plain"])
def test_a_misspelt_option_is_refused_as_python_does(pipe, hub, plain, source):
    with pytest.raises(TypeError, match="strenght"):
        load_oft_weights(pipe, plain if source == "plain" else source, strenght=0.5)
    assert list_oft_adapters(pipe) == []


def test_a_local_path_wins_over_the_hub(pipe, hub, plain, tmp_path, monkeypatch):
    (tmp_path / "someone" / "mug").mkdir(parents=True)
    shutil.copy(plain, tmp_path / "someone" / "mug" / FILE_NAME)
    monkeypatch.chdir(tmp_path)
    load_oft_weights(pipe, "someone/mug")
    load_oft_weights(pipe, plain)
    assert hub.asked == ()


def test_a_hub_adapter_is_called_by_its_trigger_file_or_repository(pipe, hub, plain, mug, tmp_path):
    hub.answer = mug
    assert load_oft_weights(pipe, "someone/mug-oft").name == "sks"
    snapshot = tmp_path / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    for name in (FILE_NAME, "late.safetensors"):
        hub.answer = shutil.copy(plain, snapshot / name)
        loaded = load_oft_weights(pipe, "someone/mug-oft", weight_name=name)
        assert loaded.name == ("mug-oft" if name == FILE_NAME else "late")


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("cannot find the file on the disk, and outgoing traffic is disabled.\nSecond line."),
        EntryNotFoundError("404: no such file"),
        RuntimeError("proxy says no"),
        HFValidationError("no valid id"),
        ConnectionError(),
        OSError(28, "No space left on device"),
        TimeoutError("timed out"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_hub_that_fails_is_one_sentence(pipe, hub, failure):
    hub.answer = failure
    message = assert_loading_refused(pipe, "someone/mug-oft", "someone/mug-oft", FILE_NAME)
    assert "\n" not in message
    assert "Second line" not in message


def test_offline_is_one_sentence(pipe, tmp_path):
    # tests/conftest.py has put the real client offline
    assert_loading_refused(pipe, "someone/mug-oft", "someone/mug-oft", FILE_NAME, cache_dir=tmp_path)
    assert_loading_refused(pipe, "../mug", "../mug")


def test_a_broken_download_is_refused_by_name(pipe, hub, tmp_path):
    hub.answer = tmp_path / FILE_NAME
    hub.answer.write_text("<!doctype html>")
    assert_loading_refused(pipe, "someone/mug-oft", FILE_NAME)


# What files say of their base


def test_the_metadata_names_the_base_but_not_where_it_lay(pipe, mug, model_folder):
    header = json.dumps(dict(load_adapter_file(mug).metadata.base))
    assert model_folder.name in header
    assert str(model_folder.parent) not in header


def test_the_class_of_a_text_encoder_is_that_of_the_pipeline(pipe, mug):
    assert isinstance(pipe, StableDiffusionPipeline)
    load_oft_weights(pipe, mug)
    assert require_bank(pipe.text_encoder).component == "CLIPTextModel"
