"""Model cards: what one says, that it runs, and what its pictures keep."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.ExifTags import GPS, IFD

from oft_diffusion import load
from oft_diffusion.cli import main
from oft_diffusion.files import load_adapter_file
from oft_diffusion.formats.tools import TOOLS, is_loaded_by
from oft_diffusion.generate import generate
from oft_diffusion.images import read_settings, save_png
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pipeline import load_oft_weights, save_oft_weights
from oft_diffusion.pipeline.card import CARD_NAME, write_model_card
from oft_diffusion.pipeline.card_text import front_matter
from oft_diffusion.training.families import FAMILIES
from tests.library.cards import PROMPT, REPO, STEPS, bare, block, blocks, card_of


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


# What a card says


def test_the_front_matter_is_what_the_hub_reads(folder):
    card = card_of(folder)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "oft", "oft-diffusion", "stable-diffusion"],
        "instance_prompt": "sks mug",
        "widget": [
            {"text": prompt, "parameters": {"negative_prompt": "red dog"}, "output": {"url": name}}
            for prompt, name in zip([PROMPT, "a red mug"], pictures, strict=True)
        ],
    }
    assert str(card) == (folder / CARD_NAME).read_text()


def test_a_public_base_is_linked_and_a_local_one_only_named(tmp_path):
    local, public = {"name": "stable-diffusion-v1-5"}, {"name": "some-org/stable_diffusion.v1-5"}
    for base in (local, public, {"name": "/models/some-org/sd"}, {"name": "../sd/model"}, {"name": 5}, {}):
        folder = bare(tmp_path, base=base)
        (folder / CARD_NAME).unlink(missing_ok=True)
        card = card_of(write_model_card(folder, REPO).parent)
        assert card.data.base_model == (public["name"] if base is public else None)
        assert card.data.get("base_model_relation") == ("adapter" if base is public else None)
        assert (f"(https://huggingface.co/{public['name']})" in card.text) == (base is public)
        assert "/models" not in card.text


def test_the_text_has_every_fact(folder):
    file, text = load_adapter_file(folder), card_of(folder).text
    parameters = sum(t.numel() for state in file.components.values() for t in state.values())
    for fact in (
        "**Trigger**: `sks`",
        "**Class word**: `mug`",
        "**Recommended strength**: 0.8",
        f"{file.path.stat().st_size / 1e6:.2f} MB, {parameters:,} parameters in",
        f"`unet` (`UNet2DConditionModel`): {len(file.components['unet'])} layers (`attention`), block size 8, `cayley`",
        f"`text_encoder` (`CLIPTextModel`): {len(file.components['text_encoder'])} layers",
        f"`{PROMPT}`\n\nnot `red dog`, seed `3`, steps `2`, guidance `4.0`, scheduler `DDIMScheduler`, strength 0.8",
        f"`torch` `{torch.__version__}`",
        file.metadata.sha256,
        "License of the adapter: `mit`",
        *(f"--to {tool} --model" for tool in ("lora", "comfyui-oftv2", "onetrainer", "peft")),
    ):
        assert fact in text, fact


def test_training_is_told_in_short_and_of_it_no_path(tmp_path):
    training = {
        "steps_done": 450, "learning_rate": 3e-3, "prior_preservation": True, "min_snr_gamma": None, "flip": True,
        "instance_prompt": "a photo of {trigger}, a {class_word}", "sampling_steps": 8, "guidance_scale": 4.0,
        "clip_skip": 1, "mixed_precision": "/home/me/x", "class_dir": "/home/me/photos", "batch_size": [1],
    }  # fmt: skip
    folder = bare(tmp_path, training=training, class_word="mug")
    card = card_of(write_model_card(folder, REPO).parent)
    facts = card.text.partition("## How it was made")[2]
    for fact in ("- steps: `450`\n", "- learning rate: `0.003`\n", "- prior preservation: `yes`\n", "precision: `x`\n"):
        assert fact in facts
    assert not re.search(r"flip|photos|gamma|batch|None|/home", card.text)
    assert card.data.get("instance_prompt") == "a photo of sks, a mug"
    asked = 'generate(pipe, "a photo of sks, a mug", [0], steps=8, guidance=4.0, clip_skip=1)'
    assert asked in block(folder, "python")
    assert "--seed 0 --steps 8 --guidance 4.0 --clip-skip 1\n" in block(folder, "bash")


def test_an_adapter_that_says_nothing_has_a_card(tmp_path):
    folder = bare(tmp_path, trigger=None)
    card = card_of(write_model_card(folder, REPO).parent)
    assert not {"widget", "instance_prompt", "license", "base_model"} & set(card.data.to_dict())
    for fact in ("changes how it draws", "**Trigger**: none", "none is stated", "path/to/the/base", '"a photo"'):
        assert fact in card.text
    for absent in ("Sample", "Gallery", "None", "Class word"):
        assert absent not in card.text
    compile(block(folder, "python"), "card", "exec")


def test_a_base_in_one_file_is_loaded_with_its_configs(tmp_path):
    folder = write_model_card(bare(tmp_path, base={"name": "v1-5.safetensors"}), REPO).parent
    assert 'load_pipeline("v1-5.safetensors", dtype, device, config_dir="path/to/configs")' in block(folder, "python")
    assert "--model v1-5.safetensors --config-dir path/to/configs" in block(folder, "bash")
    compile(block(folder, "python"), "card", "exec")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("CreativeML OpenRAIL-M", {"license": "creativeml-openrail-m"}),
        ("openrail++", {"license": "openrail++"}),
        ("other", {"license": "other"}),
        ("My own: ask me!", {"license": "other", "license_name": "my-own-ask-me"}),
        ("mit apache-2.0", {"license": "other", "license_name": "mit-apache-2.0"}),
        ("лицензия", {"license": "other", "license_name": "custom"}),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_another(tmp_path, said, expected):
    card = card_of(write_model_card(bare(tmp_path), REPO, license=said).parent)
    assert {k: v for k, v in card.data.to_dict().items() if k.startswith("license")} == expected
    assert f"License of the adapter: `{said}`" in card.text


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_every_family_has_its_tag(pipeline):
    tags = {
        tuple((front_matter(AdapterMetadata({}, base=base), None, {}).tags or [])[4:])
        for base in ({"pipeline": pipeline}, {"family": FAMILIES[pipeline].__name__})
    }
    [[tag]] = tags
    assert re.fullmatch(r"[a-z0-9-]+", tag)
    unknown = AdapterMetadata({}, base={"components": {"unet": "UNet2DConditionModel"}, "pipeline": "<b>"})
    assert len(front_matter(unknown, None, {}).tags or []) == 4


# A card that runs


def test_its_python_draws_its_first_picture(folder, model_folder, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(model_folder.name).symlink_to(model_folder)
    source = block(folder, "python").replace(REPO, str(folder))
    exec(compile(source, "card", "exec"), {"__name__": "card"})  # noqa: S102 - our own card
    assert Image.open("picture.png").tobytes() == drawn[0].image.tobytes()


def test_its_commands_run(folder, model_folder, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "usual_dtype", lambda device: torch.float32)  # as `drawn` was
    Path(model_folder.name).symlink_to(model_folder)
    commands = [row for text in blocks(folder, "bash") for row in text.splitlines() if not row.startswith("#")]
    assert [shlex.split(row)[:2] for row in commands] == [["oft-diffusion", v] for v in ["generate"] + ["convert"] * 5]
    for row in commands:
        assert main(shlex.split(row.replace(REPO, str(folder)))[1:]) == 0, capsys.readouterr().err
    [picture] = Path("pictures").glob("*.png")
    assert Image.open(picture).tobytes() == drawn[0].image.tobytes()
    made = {path.name for path in tmp_path.glob("mug-oft-*")}
    assert made == {
        "mug-oft-lora.safetensors",
        "mug-oft-comfyui-oftv2.safetensors",
        "mug-oft-onetrainer.safetensors",
        "mug-oft-sd-scripts.safetensors",
        "mug-oft-peft",
    }


@pytest.mark.parametrize(
    ("classes", "tools"),
    [
        (
            {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"},
            {"comfyui-oftv2", "onetrainer", "sd-scripts"},
        ),
        ({"transformer": "WanTransformer3DModel"}, {"comfyui-oftv2"}),
        ({"transformer": "SanaTransformer2DModel"}, {"onetrainer"}),
        ({"transformer": "Flux2Transformer2DModel", "text_encoder": "Qwen3ForCausalLM"}, set()),
        ({}, set()),
    ],
)
def test_only_tools_that_load_such_an_adapter_are_named(classes, tools):
    assert {tool for tool in TOOLS if is_loaded_by(tool, classes)} == tools


# Pictures


def test_pictures_keep_pixels_and_settings(folder, drawn):
    for number, picture in enumerate(drawn, 1):
        [path] = folder.glob(f"sample-{number}-*.png")
        assert re.fullmatch(r"sample-\d-[0-9a-f]{8}\.png", path.name)
        assert read_settings(path) == picture.settings
        assert Image.open(path).tobytes() == picture.image.tobytes()


def test_pictures_may_be_files_of_any_kind_and_lose_what_a_camera_told(tmp_path):
    photo, exif = Image.new("RGB", (8, 6), "red"), Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6  # to be turned by a quarter
    exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitudeRef] = "N"
    photo.save(tmp_path / "photo.jpg", exif=exif)
    workflow = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    workflow.info["workflow"] = "secret"
    ours = save_png(Image.new("RGB", (4, 4)), tmp_path / "ours.png", {"prompt": "ours", "model": "/home/me/sd"})
    folder = bare(tmp_path)
    write_model_card(folder, REPO, sample_images=[str(tmp_path / "photo.jpg"), workflow, ours, Image.open(ours)])
    paths = sorted(folder.glob("sample-*.png"))
    found = [Image.open(path) for path in paths]
    assert [picture.size for picture in found] == [(6, 8), (4, 4), (4, 4), (4, 4)]
    assert [picture.mode for picture in found] == ["RGB", "RGBA", "RGB", "RGB"]
    assert all(not picture.getexif() for picture in found)
    assert [sorted(picture.info) for picture in found] == [[], [], *[["oft_diffusion", "parameters"]] * 2]
    assert read_settings(paths[3]) == read_settings(paths[2]) == {"prompt": "ours", "model": "sd"}
    assert [entry["text"] for entry in card_of(folder).data.widget] == ["-", "-", "ours", "ours"]


def test_one_picture_may_stand_for_a_list(tmp_path, drawn):
    folder = bare(tmp_path)
    for one in (drawn[0], drawn[0].image, str(save_png(drawn[0].image, tmp_path / "x.png"))):
        write_model_card(folder, REPO, sample_images=one)
        assert len(card_of(folder).data.widget) == 1


def test_odd_settings_inside_a_picture_are_shown_or_left_out(tmp_path):
    odd = {
        "prompt": 5, "seed": "</code>", "steps": 10**30, "guidance": float("nan"), "width": -1, "height": 4,
        "adapters": [{"name": "a", "strength": 0.5}], "scheduler": None, "negative_prompt": ["a"], "x": Path("/a/b"),
    }  # fmt: skip
    picture, folder = Image.new("RGB", (4, 4)), bare(tmp_path)
    write_model_card(folder, REPO, sample_images=[SimpleNamespace(image=picture, settings=odd)])
    asked = """generate(pipe, "5", [0], negative_prompt="['a']")"""
    assert asked in block(folder, "python")
    assert "strength 0.5" in card_of(folder).text
    broken: Any
    for broken in ({"adapters": [7]}, {"adapters": [{}]}, {"clip_skip": "x"}, [1], "text", 5, None):
        write_model_card(folder, REPO, sample_images=[SimpleNamespace(image=picture, settings=broken)])
        assert card_of(folder).data.widget[0]["text"] == "-"
    deep = Image.new("RGB", (4, 4))
    deep.info["oft_diffusion"] = "[" * 100_000
    write_model_card(folder, REPO, sample_images=[deep])
