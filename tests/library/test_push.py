"""Pushing: what is uploaded and what never, and what is where when something fails."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image

from oft_diffusion.errors import AdapterError, AdapterFileError, ConfigError, DataError
from oft_diffusion.files import FILE_NAME, load_adapter_file
from oft_diffusion.generate import generate
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pipeline import load_oft_weights, save_oft_weights
from oft_diffusion.pipeline.card import CARD_NAME, write_model_card
from oft_diffusion.pipeline.saving import push_oft_weights
from tests.library.cards import PROMPT, REPO, STEPS, Hub, bare, card_of
from tests.library.support import assert_one_sentence, copy_pipe, draw, folder_bytes


@pytest.fixture
def loaded(pipe, mug):
    load_oft_weights(pipe, mug, adapter_name="mug", strength=0.8)
    return pipe


@pytest.fixture
def drawn(loaded):
    # One by one, as the card's code draws: batches round otherwise.
    return generate(loaded, [PROMPT, "a red mug"], [3, 4], batch_size=1, **STEPS)


@pytest.fixture
def folder(loaded, drawn, tmp_path):
    """A folder with an adapter, its card and two pictures."""
    folder = tmp_path / "mug"
    save_oft_weights(loaded, folder, "mug", recommended_strength=0.8)
    write_model_card(folder, REPO, license="mit", sample_images=drawn)
    return folder


# Pushing


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.download)
    return fake


def test_what_is_pushed_is_loaded_by_its_name_and_draws_the_same(loaded, drawn, hub, base_pipe, tmp_path):
    picture = draw(loaded)
    path = save_oft_weights(
        loaded, tmp_path / "out", "mug", recommended_strength=0.8, push_to_hub=REPO, private=True, token="hf_x",
        license="mit", sample_images=drawn, commit_message="First",
    )  # fmt: skip
    assert path == tmp_path / "out" / FILE_NAME
    assert folder_bytes(hub.root / REPO) == folder_bytes(tmp_path / "out")
    assert {p.suffix for p in (hub.root / REPO).iterdir()} == {".safetensors", ".md", ".png"}
    assert hub.asked["token"] == "hf_x"
    assert hub.asked["create"] == {"repo_id": REPO, "private": True, "exist_ok": True}
    assert hub.asked["upload"]["commit_message"] == "First"
    fresh = copy_pipe(base_pipe)
    found = load_oft_weights(fresh, REPO, strength=0.8).metadata
    assert found is not None
    assert found.strength == 0.8
    assert torch.equal(draw(fresh), picture)


def test_only_the_adapter_its_card_and_the_pictures_in_it_are_uploaded(folder, hub):
    (folder / "checkpoint-1").mkdir()
    for other in ("secret.png", "private.jpg", "losses.json", "x.safetensors", f"checkpoint-1/{FILE_NAME}"):
        (folder / other).write_text("x")
    shown = {path.name for path in folder.glob("sample-*.png")}
    write_model_card(folder, REPO)  # without pictures now; the old ones stay on the disk
    assert push_oft_weights(folder, REPO) == f"https://huggingface.co/{REPO}"
    assert set(folder_bytes(hub.root / REPO)) == {FILE_NAME, CARD_NAME}
    assert shown <= set(folder_bytes(folder))


def test_a_folder_without_a_card_gets_one(loaded, hub, tmp_path):
    push_oft_weights(save_oft_weights(loaded, tmp_path, "mug"), REPO)
    assert REPO in card_of(hub.root / REPO).text


def test_an_edited_card_is_pushed_as_it_is_and_never_replaced(folder, loaded, hub):
    card = folder / CARD_NAME
    card.write_text(card.read_text().replace("## License", "It is my mug.\n\n## License"))
    before = folder_bytes(folder)
    push_oft_weights(folder, "me/other")
    assert "It is my mug" in card_of(hub.root / "me" / "other").text
    hub.asked.clear()
    for write in (
        lambda: write_model_card(folder, REPO),
        lambda: save_oft_weights(loaded, folder, "mug", push_to_hub=REPO),
    ):
        with pytest.raises(AdapterFileError) as error:
            write()
        assert_one_sentence(error, CARD_NAME, "edited")
    assert folder_bytes(folder) == before
    assert not hub.asked


def test_a_card_as_it_was_written_is_replaced_also_with_windows_line_ends(folder):
    card = folder / CARD_NAME
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    write_model_card(folder, "me/other")
    assert "me/other" in card.read_text()


def test_a_card_of_another_adapter_or_repository_is_not_pushed(folder, loaded, hub, make):
    with pytest.raises(AdapterFileError) as error:
        push_oft_weights(folder, "me/other")
    assert_one_sentence(error, CARD_NAME, "me/other", "write_model_card")
    shutil.copy(make("other", seed=9), folder / FILE_NAME)
    with pytest.raises(AdapterFileError) as error:
        push_oft_weights(folder, REPO)
    assert_one_sentence(error, CARD_NAME, "another adapter")
    assert not hub.asked


def refused_by_hub(status):
    response: Any = SimpleNamespace(headers={}, status_code=status, request=None)
    return HfHubHTTPError(f"{status} Client Error. (Request ID: 1)\n\nSecond line.", response=response)


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (refused_by_hub(401), "hf auth login"),
        (LocalTokenNotFoundError("Token is required, but no token found."), "hf auth login"),
        (refused_by_hub(403), f"may write to {REPO}"),
        (refused_by_hub(500), "500 Client Error. (Request ID: 1) Second line."),
        (ConnectionError("network\nunreachable"), "network unreachable"),
        (ValueError("Invalid metadata in README.md.\n- license must be one of ..."), "license must be one of"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=["401", "no token", "403", "500", "network", "metadata", "timeout"],
)
def test_a_push_that_fails_says_what_is_where_and_can_be_repeated(loaded, drawn, hub, tmp_path, refusal, words):
    hub.refusal = refusal
    with pytest.raises(AdapterFileError) as error:
        save_oft_weights(loaded, tmp_path / "out", "mug", push_to_hub=REPO, sample_images=drawn)
    assert_one_sentence(error, str(tmp_path / "out"), words)
    assert len(folder_bytes(tmp_path / "out")) == 4
    hub.refusal = None
    [command] = re.findall(r"push_oft_weights\(.*?\)", str(error.value))
    eval(command)  # noqa: S307 - what our own message says
    assert folder_bytes(hub.root / REPO) == folder_bytes(tmp_path / "out")


def test_offline_is_one_sentence(loaded, tmp_path):
    # tests/conftest.py has put the real client offline
    with pytest.raises(AdapterFileError) as error:
        save_oft_weights(loaded, tmp_path / "out", "mug", push_to_hub=REPO)
    assert_one_sentence(error, str(tmp_path / "out"), "offline")
    assert set(folder_bytes(tmp_path / "out")) == {FILE_NAME, CARD_NAME}


# All or nothing


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("error", [AdapterFileError("full", expected="space", fix="make some"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(folder, monkeypatch, failing, error):
    from oft_diffusion import disk

    before, written = folder_bytes(folder), []

    def write(path, data):
        written.append(path)
        if len(written) == failing:
            raise error
        disk.write_atomically(path, data)

    monkeypatch.setattr("oft_diffusion.images.write_atomically", write)
    monkeypatch.setattr("oft_diffusion.pipeline.card.write_atomically", write)
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    with pytest.raises(type(error)):
        write_model_card(folder, "me/new", sample_images=pictures)
    assert folder_bytes(folder) == before


@pytest.mark.parametrize(
    "name", [True, "", "mug", "a/b/c", "../mug", "me/", "/me/mug", "me/mug\n", "я/mug", "me/m ug", Path("me/mug")]
)
def test_a_name_that_no_repository_has(loaded, hub, tmp_path, name):
    for push in (
        lambda: save_oft_weights(loaded, tmp_path / "out", "mug", push_to_hub=name),
        lambda: write_model_card(bare(tmp_path), name),
        lambda: push_oft_weights(bare(tmp_path), name),
    ):
        with pytest.raises(ConfigError) as error:
            push()
        assert_one_sentence(error, "user/name")
    assert not (tmp_path / "out").exists()
    assert not hub.asked


@pytest.mark.parametrize(
    ("told", "kind", "words"),
    [
        ({"license": ""}, ConfigError, "license"),
        ({"license": True}, ConfigError, "license"),
        ({"sample_images": ["nowhere.png"]}, DataError, "nowhere.png"),
        ({"sample_images": [__file__]}, DataError, Path(__file__).name),
        ({"sample_images": [None]}, DataError, "no picture"),
        ({"sample_images": 5}, DataError, "no picture"),
        ({"recommended_strength": "strong"}, AdapterError, "strong"),
        ({"recommended_strength": float("nan")}, AdapterError, "nan"),
        ({"recommended_strength": [1.0, 0.5]}, AdapterError, "strength"),
        ({"metadata": AdapterMetadata({}, strength="x")}, AdapterError, "'x'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_in_a_card_is_refused_before_anything_is_written(loaded, hub, tmp_path, told, kind, words):
    with pytest.raises(kind) as error:
        save_oft_weights(loaded, tmp_path / "out", "mug", push_to_hub=REPO, **told)
    assert_one_sentence(error, words)
    assert not (tmp_path / "out").exists()
    assert not hub.asked


@pytest.mark.parametrize(
    "told",
    [{"private": False}, {"token": "x"}, {"license": "mit"}, {"commit_message": "x"}, {"sample_images": "drawn"}],
)
def test_what_only_the_hub_has_a_use_for_is_no_silent_no_op(loaded, drawn, tmp_path, told):
    told = {name: drawn if value == "drawn" else value for name, value in told.items()}
    with pytest.raises(ConfigError) as error:
        save_oft_weights(loaded, tmp_path / "out", "mug", **told)
    assert_one_sentence(error, next(iter(told)), "push_to_hub")
    assert not (tmp_path / "out").exists()
    save_oft_weights(loaded, tmp_path / "out", "mug", sample_images=[])


def test_on_the_hub_an_adapter_has_one_name(loaded, hub, tmp_path):
    with pytest.raises(AdapterFileError) as error:
        save_oft_weights(loaded, tmp_path / "mug.safetensors", "mug", push_to_hub=REPO)
    assert_one_sentence(error, "mug.safetensors", FILE_NAME)
    save_oft_weights(loaded, tmp_path / "mug.safetensors", "mug")
    with pytest.raises(AdapterFileError) as error:
        write_model_card(tmp_path / "mug.safetensors", REPO)
    assert_one_sentence(error, "mug.safetensors", FILE_NAME)
    with pytest.raises(AdapterFileError) as error:
        push_oft_weights(tmp_path, REPO)
    assert_one_sentence(error, FILE_NAME)
    assert save_oft_weights(loaded, tmp_path / FILE_NAME, "mug", push_to_hub=REPO) == tmp_path / FILE_NAME
    assert not (hub.root / REPO / "mug.safetensors").exists()


def test_a_readme_of_something_else_is_never_replaced(loaded, hub, tmp_path):
    (tmp_path / CARD_NAME).write_bytes("# My project\xff".encode("latin1"))
    with pytest.raises(AdapterFileError) as error:
        save_oft_weights(loaded, tmp_path, "mug", push_to_hub=REPO)
    assert_one_sentence(error, str(tmp_path / CARD_NAME), "move it away")
    assert set(folder_bytes(tmp_path)) == {CARD_NAME}


# The recommended strength


def test_the_recommended_strength_stays_with_the_adapter(loaded, mug, tmp_path):
    assert load_adapter_file(mug).metadata.strength == 1.0
    numbers: Any = np.float32(0.75)
    once = save_oft_weights(loaded, tmp_path / "once", "mug", recommended_strength=numbers)
    assert load_adapter_file(once).metadata.strength == 0.75
    load_oft_weights(loaded, once, adapter_name="again")
    for told, expected in ((None, 0.75), (-1, -1.0), (0, 0.0)):
        path = save_oft_weights(loaded, tmp_path / "twice", "again", recommended_strength=told)
        assert load_adapter_file(path).metadata.strength == expected
    known = AdapterMetadata({}, strength=0.5)
    assert load_adapter_file(save_oft_weights(loaded, tmp_path, "again", known)).metadata.strength == 0.5


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", '"1"', "true", "null", "[1]", "1" * 400])
def test_a_strength_that_is_no_finite_number_is_refused(text):
    sound = AdapterMetadata({}).to_json()
    assert '"strength": 1.0' in sound
    with pytest.raises((TypeError, ValueError)):
        AdapterMetadata.from_json(sound.replace('"strength": 1.0', f'"strength": {text}'))
    for fine in ("-1", "0", "1e300"):
        found = AdapterMetadata.from_json(sound.replace('"strength": 1.0', f'"strength": {fine}'))
        assert found.strength == json.loads(fine)
    without = {k: v for k, v in json.loads(sound).items() if k != "strength"}
    assert AdapterMetadata.from_json(json.dumps(without)).strength == 1.0


# No leaks


def test_nothing_that_is_uploaded_tells_where_it_was_made(loaded, drawn, hub, tmp_path, model_folder):
    here = [str(tmp_path), str(Path.home()), str(Path.cwd()), str(model_folder.parent)]
    known = AdapterMetadata(
        {},
        base={"name": str(model_folder), "components": {}},
        trigger="sks",
        training={"steps_done": 1, "resume": f"{tmp_path}/run 1/checkpoint", "files": [f"see {tmp_path}/a.png"]},
    )
    picture = replace(
        drawn[0], settings=drawn[0].settings | {"model": str(model_folder), "from": {"at": f"{tmp_path}/x"}}
    )
    photo = tmp_path / "photo.jpg"
    picture.image.save(photo, comment=str(tmp_path))
    path = save_oft_weights(loaded, tmp_path / "out", "mug", known, push_to_hub=REPO, sample_images=[picture, photo])
    assert load_adapter_file(path).metadata.training["files"] == ["see a.png"]
    uploaded = folder_bytes(hub.root)
    assert len(uploaded) == 4
    for name, data in uploaded.items():
        assert not [place for place in here if len(place) > 1 and place.encode() in data], name
