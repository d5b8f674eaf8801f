"""The console script, in this process: what it prints, what it writes, and its exit status."""

import functools
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from oft_diffusion.cli import main, parse_adapter
from oft_diffusion.errors import ConfigError
from oft_diffusion.files import FILE_NAME, load_adapter_file, save_adapter_file
from oft_diffusion.images import read_settings
from oft_diffusion.pocket import GUIDANCE
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import assert_one_sentence, folder_bytes, with_metadata


@pytest.fixture(scope="module")
def mug(make):
    return make("mug", seed=1, trigger="sks", class_word="mug", training={"steps": 400, "prompt": "a photo of sks mug"})


@pytest.fixture
def generate(model_folder, tmp_path, capsys):
    """Run `oft-diffusion generate` on the tiny base; its status, output and errors."""

    def run(*arguments, model=model_folder, out=tmp_path / "out"):
        status = main(["generate", "--model", str(model), "--out", str(out), "--steps", "2", *map(str, arguments)])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def error_line(text):
    """The error is the last line, one sentence, and no traceback came before it."""
    assert "Traceback" not in text
    line = text.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert " Expected: " in line
    assert " Fix: " in line
    return line


# generate


def test_pictures_are_written_with_their_settings(generate, tmp_path, mug):
    status, out, _ = generate("a photo of sks mug", "--adapter", mug, "--seed", 7, "--count", 3, "--negative", "red")
    assert status == 0
    paths = [tmp_path / "out" / f"{seed:05d}.png" for seed in (7, 8, 9)]
    assert [line.split()[-1] for line in out.splitlines()[-3:]] == [str(path) for path in paths]
    assert "adapter sks on " in out
    assert "3 of 3" in out
    for seed, path in zip((7, 8, 9), paths, strict=True):
        settings = read_settings(path)
        assert settings["seed"] == seed
        assert settings["prompt"] == "a photo of sks mug"
        assert settings["negative_prompt"] == "red"
        assert [(a["name"], a["strength"]) for a in settings["adapters"]] == [("sks", 1.0)]
        assert Image.open(path).size == (16, 16)
        assert "OFT sks: 1" in Image.open(path).info["parameters"]


def test_a_grid_of_all_pictures(generate, tmp_path):
    status, out, _ = generate("a mug", "--count", 5, "--grid")
    assert status == 0
    assert out.split()[-1] == str(tmp_path / "out" / "grid.png")
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.width == 6 + 4 * 22
    assert grid.height > 6 + 2 * 22
    assert read_settings(tmp_path / "out" / "grid.png")["seed"] == 0


def test_strengths_on_the_command_line(generate, tmp_path, mug, make):
    style = make("style", seed=2, parts=("unet",))
    pictures = {}
    for key, arguments in {
        "none": [],
        "zero": ["--adapter", f"{mug}:0"],
        "half": ["--adapter", f"{mug}:0.5"],
        "one": ["--adapter", f"{mug}:1"],
        "plain": ["--adapter", mug],
        "two": ["--adapter", f"{mug}:0.5", "--adapter", f"{style}:-1e-1"],
    }.items():
        assert generate("a photo of sks mug", *arguments, out=tmp_path / key)[0] == 0
        pictures[key] = Image.open(tmp_path / key / "00000.png").tobytes()
    assert pictures["none"] == pictures["zero"]
    assert pictures["one"] == pictures["plain"]
    assert len(set(pictures.values())) == 4
    told = read_settings(tmp_path / "two" / "00000.png")["adapters"]
    assert [(a["name"], a["strength"], a["sha256"]) for a in told] == [
        ("sks", 0.5, load_adapter_file(mug).metadata.sha256),
        ("style", -0.1, load_adapter_file(style).metadata.sha256),
    ]


def test_size_guidance_and_steps_arrive(generate, tmp_path):
    assert generate("a mug", "--width", 32, "--height", 16, "--guidance", 1.5, "--steps", 3)[0] == 0
    settings = read_settings(tmp_path / "out" / "00000.png")
    assert (settings["width"], settings["height"], settings["guidance"], settings["steps"]) == (32, 16, 1.5, 3)


def test_guidance_is_that_of_the_adapters_training(generate, mug, style, tmp_path):
    def guidance(*arguments, out, **how):
        assert generate("a photo of sks mug", *arguments, out=tmp_path / out, **how)[0] == 0
        return read_settings(tmp_path / out / "00000.png")["guidance"]

    file = load_adapter_file(mug)
    told = save_adapter_file(
        tmp_path / "told.safetensors", file.components, replace(file.metadata, training={"guidance_scale": 2.5})
    )
    odd = save_adapter_file(
        tmp_path / "odd.safetensors", file.components, replace(file.metadata, training={"guidance_scale": "high"})
    )
    assert guidance(out="none") == 7.5
    assert guidance("--adapter", style, "--adapter", told, out="told") == 2.5
    assert guidance("--adapter", told, "--guidance", 3.0, out="asked") == 3.0
    assert guidance("--adapter", odd, out="odd") == 7.5
    assert guidance("--steps", 1, out="pocket", model="pocket") == GUIDANCE


@pytest.mark.parametrize(
    ("prompt", "warned"),
    [
        ("a photo of sks mug", False),
        ("a photo of SKS mug", False),
        ("sks", False),
        ("a mug, sks, in the snow", False),
        ("(sks:1.2) mug.", False),
        ("a photo of a mug", True),
        ("", True),
        ("a risksome mug", True),
    ],
)
def test_a_prompt_without_the_trigger_is_warned_of(generate, mug, prompt, warned):
    status, _, err = generate(prompt, "--adapter", mug)
    assert status == 0
    assert ("warning: the prompt lacks the adapter's trigger 'sks'" in err) == warned


@pytest.mark.parametrize(
    ("trigger", "prompt"), [("<mug>", "a <mug> here"), ("my mug", "this is my mug!"), ("кот", "Кот")]
)
def test_odd_triggers_are_found(generate, mug, tmp_path, trigger, prompt):
    path = tmp_path / "odd.safetensors"
    shutil.copy(mug, path)
    with_metadata(path, {"trigger": trigger})
    assert "warning: the prompt lacks" not in generate(prompt, "--adapter", path)[2]
    assert "warning: the prompt lacks" in generate("a dog", "--adapter", path)[2]


def test_another_clip_skip_than_in_training_is_warned_of(generate, mug, tmp_path):
    skipping = tmp_path / "skipping.safetensors"
    shutil.copy(mug, skipping)
    with_metadata(skipping, {"training": {"clip_skip": 1}})
    for path, options, warned in (
        (mug, (), None),
        (mug, ("--clip-skip", 1), "was trained with clip skip off"),
        (skipping, (), "was trained with clip skip 1"),
        (skipping, ("--clip-skip", 1), None),
    ):
        status, _, err = generate("a sks mug", "--adapter", path, *options)
        assert status == 0
        assert warned in err if warned else "clip skip" not in err


def test_what_is_wrong_is_one_sentence_and_status_1(generate, tmp_path, mug, model_folder):
    for arguments, options, words in (
        (["a", "--adapter", "none.safetensors"], {}, ["none.safetensors"]),
        (["a", "--adapter", tmp_path], {}, [FILE_NAME]),
        (["a", "--adapter", f"{mug}:high"], {}, ["high"]),
        (["a", "--adapter", f"{mug}:nan"], {}, ["nan"]),
        (["a", "--adapter", f"{mug}:"], {}, ["strength"]),
        (["a", "--count", 0], {}, ["--count 0"]),
        (["a", "--steps", 0], {}, ["--steps 0"]),
        (["a", "--steps", 5000], {}, ["5000"]),
        (["a", "--width", 64], {}, ["width=64"]),
        (["a", "--width", 17, "--height", 17], {}, ["17"]),
        (["a", "--seed", 2**70], {}, ["settings"]),
        (["a", "--device", "nonsense"], {}, ["nonsense"]),
        (["a"], {"model": tmp_path / "none"}, ["none"]),
        (["a"], {"model": tmp_path}, ["model_index.json"]),
        (["a"], {"out": model_folder / "model_index.json", "model": "not-looked-at"}, ["--out", "model_index.json"]),
    ):
        status, _, err = generate(*arguments, **options)
        assert status == 1, arguments
        line = error_line(err)
        assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_a_strength_is_read_before_the_model_is(generate, tmp_path):
    status, _, err = generate("a", "--adapter", "mug:x", model=tmp_path / "none")
    assert status == 1
    assert "'x'" in error_line(err)


def test_ctrl_c_is_status_130(generate, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("oft_diffusion.load.load_pipeline", interrupted)
    status, _, err = generate("a mug")
    assert status == 130
    assert err.strip() == "interrupted"


def test_pictures_are_kept_as_they_come_and_replace_none(generate, tmp_path, monkeypatch):
    assert generate("a red mug", "--count", 2, "--grid")[0] == 0
    first = folder_bytes(tmp_path / "out")
    assert sorted(first) == ["00000.png", "00001.png", "grid.png"]
    draw, calls = StableDiffusionPipeline.__call__, []

    @functools.wraps(draw)
    def breaks_at_the_second_batch(pipe, *arguments, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(pipe, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", breaks_at_the_second_batch)
    assert generate("a blue mug", "--count", 8, "--grid")[0] == 130
    after = folder_bytes(tmp_path / "out")
    assert sorted(set(after) - set(first)) == ["00000_2.png", "00001_2.png", "00002.png", "00003.png"]
    assert {name: after[name] for name in first} == first
    assert read_settings(tmp_path / "out" / "00000_2.png")["prompt"] == "a blue mug"


def test_a_single_checkpoint_is_drawn_with(generate, tmp_path):
    folder = write_tiny_sd(tmp_path)
    file = write_single_file(StableDiffusionPipeline.from_pretrained(folder), tmp_path / "tiny.safetensors")
    assert generate("a mug", "--config-dir", folder, model=file)[0] == 0
    assert generate("a mug", model=folder)[0] == 0
    single, whole = (Image.open(tmp_path / "out" / name).tobytes() for name in ("00000.png", "00000_2.png"))
    assert single == whole
    assert "--config-dir" in error_line(generate("a mug", model=file)[2])


# Paths with strengths


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("mug", "mug", None),
        ("runs/mug:0.8", "runs/mug", 0.8),
        ("runs/mug:1", "runs/mug", 1.0),
        ("runs/mug:-.5", "runs/mug", -0.5),
        ("runs/mug:1e-1", "runs/mug", 0.1),
        ("mug.safetensors:0", "mug.safetensors", 0.0),
        (r"C:\runs\mug.safetensors", r"C:\runs\mug.safetensors", None),
        (r"C:\runs\mug.safetensors:0.5", r"C:\runs\mug.safetensors", 0.5),
        ("someone/mug-oft:0.5", "someone/mug-oft", 0.5),
        ("a:b/mug", "a:b/mug", None),
        ("a:b/mug:2", "a:b/mug", 2.0),
    ],
)
def test_adapters_on_the_command_line(text, path, strength):
    assert parse_adapter(text) == (path, strength)


def test_an_existing_file_with_a_colon_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mug:2").mkdir()
    assert parse_adapter("mug:2") == ("mug:2", None)
    assert parse_adapter("mug:2:0.5") == ("mug:2", 0.5)


@pytest.mark.parametrize("text", ["mug:", "mug:half", "mug:0.5x", "mug:1:x"])
def test_a_strength_that_is_no_number(text):
    with pytest.raises(ConfigError) as error:
        parse_adapter(text)
    assert_one_sentence(error, text)


# info


def test_info_tells_everything(mug, capsys):
    assert main(["info", str(mug)]) == 0
    out = capsys.readouterr().out
    meta = load_adapter_file(mug).metadata
    for text in ("mug.safetensors", "sks", "mug", "UNet2DConditionModel", "CLIPTextModel", "block_size 8", "cayley",
                 "orthogonality error", "steps = 400", "a photo of sks mug", "torch = ", meta.sha256, meta.created,
                 "model"):  # fmt: skip
        assert text in out, text
    errors = [float(line.split()[-1]) for line in out.splitlines() if "orthogonality error" in line]
    assert len(errors) == 2
    assert all(0 < error < 1e-5 for error in errors)


def test_info_on_a_folder_and_on_a_bare_file(mug, tmp_path, capsys):
    shutil.copy(mug, tmp_path / FILE_NAME)
    with_metadata(tmp_path / FILE_NAME, {"trigger": None, "class_word": None, "base": {}, "training": {}})
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("(none)") == 2
    assert "(unknown)" in out
    assert "training" not in out


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle", "folder"])
def test_info_on_what_is_no_adapter(mug, tmp_path, capsys, damage):
    path = tmp_path / "bad.safetensors"
    if damage == "cut":
        path.write_bytes(mug.read_bytes()[:500])
    elif damage == "pickle":
        path = tmp_path / "bad.pt"
        path.write_bytes(b"\x80\x04.")
    elif damage == "folder":
        path.mkdir()
    assert main(["info", str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert path.name in error_line(shown.err)


# Usage


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["info", "--help"]])
def test_help_is_status_0(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "oft-diffusion" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["info"], ["generate", "a", "--count", "x"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: oft-diffusion" in capsys.readouterr().err


def test_python_m_is_the_console_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["oft-diffusion", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("oft_diffusion", run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: oft-diffusion")
    for verb in ("train", "generate", "info"):
        assert verb in shown


@pytest.mark.slow
def test_python_m_from_a_shell(mug):
    command = [sys.executable, "-m", "oft_diffusion", "info", str(mug)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "sks" in shown.stdout
    assert subprocess.run([*command, "x"], capture_output=True, check=False).returncode == 2
    command[-1] = "none.safetensors"
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "none.safetensors" in error_line(failed.stderr)
