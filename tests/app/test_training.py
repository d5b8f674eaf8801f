"""What is said before a training: about words, examples and presets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app import model, presets
from app.drawing import Request
from app.machine import Cancelled, Job
from app.model import Model
from app.page import build
from app.presets import POCKET, RECIPES, beginning, fitting
from app.runs import Wish
from app.session import Session
from oft_diffusion.errors import ConfigError
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import SUBJECTS
from tests.app.test_photos import noise
from tests.helpers.tiny_families import tiny_family, write_tiny_family


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session(tmp_path_factory.mktemp("work"))
    yield session
    session.machine.stop()


def test_words_that_would_not_do_are_pointed_out(pocket: Session) -> None:
    notes = pocket.training.words_notes
    assert notes("qzxjkv", "mug") == notes("", "") == []
    [common] = notes("car", "")
    assert "common word" in common
    [unknown] = notes("qzxjkv", "Elephant")
    assert "never seen a elephant" in unknown
    assert "mug" in unknown
    assert any("would be trained, too" in note for note in notes("zwx mug", "mug"))


def test_other_models_are_asked_whether_the_class_word_is_a_common_one(session: Session) -> None:
    notes = session.training.words_notes
    assert notes("zwx", "Dog") == notes("zwx", "red-dog") == []
    [unknown] = notes("zwx", "red axolotl")
    assert unknown == "this model may not know a red axolotl: its tokenizer has no common word for axolotl"


def test_an_example_takes_the_place_of_what_was_there(pocket: Session, person: str) -> None:
    training = pocket.training
    assert set(training.examples()) == set(SUBJECTS)
    for name in ("bow_cat", "captain_mug"):
        subject = training.take_example(person, name)
        assert subject is SUBJECTS[name]
    photos = training.photos(person).look(training.resolution)
    assert len(photos) == 5
    assert all(photo.notes == () and "a blue mug" in photo.caption for photo in photos)
    for name in ("../bow_cat", "", "no_such"):
        with pytest.raises(ConfigError, match="no such example"):
            training.take_example(person, name)


def test_other_models_have_presets_that_fit_the_machine(
    session: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.training.examples() == []
    with pytest.raises(ConfigError):
        session.training.take_example(person, "bow_cat")
    assert session.training.resolution == session.abilities.size
    orders = []
    for memory in (8e9, 24e9):
        fresh = Session(session.workspace.root, session.model.source)
        monkeypatch.setattr(type(fresh.model), "memory", lambda _, found=memory: found)
        orders.append(list(fresh.training.runs.presets))
        assert fresh.training.defaults()["mixed_precision"] == fresh.model.precision()
        assert fresh.training.defaults()["gradient_checkpointing"] is (memory == 8e9)
    assert orders[0] == ["sd15 8 GB", "sd15 12 GB", "sd15", "sd15_text_encoder"]
    assert orders[1] == ["sd15 12 GB", "sd15 8 GB", "sd15", "sd15_text_encoder"]


SDXL, SD3, FLUX = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"


def test_every_preset_is_there_and_fits_by_memory() -> None:
    for pipeline in (*RECIPES, "SanaPipeline"):
        for preset in (*fitting(pipeline, 8e9).values(), *POCKET.values()):
            assert Path(f"train_scripts/configs/{preset.recipe}.toml").is_file()
    sdxl = {memory: list(fitting(SDXL, memory)) for memory in (4e9, 12e9, 15e9, 25.4e9, 80e9)}
    assert [names[0] for names in sdxl.values()] == ["sdxl 8 GB", "sdxl 12 GB", "sdxl 12 GB", "sdxl 16 GB", "sdxl"]
    assert {tuple(sorted(names)) for names in sdxl.values()} == {("sdxl", "sdxl 12 GB", "sdxl 16 GB", "sdxl 8 GB")}
    assert fitting(SDXL, 8e9)["sdxl 16 GB"].about == "SDXL, for 16 GB of memory or more"
    assert fitting(SDXL, 8e9)["sdxl"] == ("SDXL, however much memory that takes", "sdxl", None)
    assert list(fitting(FLUX, 8e9)) == ["flux 8 GB", "flux 12 GB", "flux 16 GB", "flux 24 GB", "flux"]
    assert next(iter(fitting(SD3, 8e9, layers=24))) == "sd35 8 GB"
    assert next(iter(fitting(SD3, 8e9, layers=38))) == "sd35 8 GB"
    assert list(fitting("SanaPipeline", 80e9)) == ["sd35", "sd35 12 GB", "sd35 8 GB"]
    for memory in (12e9, 25.4e9):  # a card of 24 GiB has no more than the largest size
        assert list(fitting("SanaPipeline", memory)) == ["sd35 12 GB", "sd35 8 GB", "sd35"]


def test_a_trained_text_encoder_is_offered_without_a_size() -> None:
    found = fitting("StableDiffusionPipeline", 12e9)
    names = {name: preset for name, preset in found.items() if preset.recipe == "sd15_text_encoder"}
    assert names == {"sd15_text_encoder": ("Stable Diffusion with its text encoder", "sd15_text_encoder", None)}


def test_of_a_single_file_presets_quantize_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(fitting(SDXL, 12e9, single_file=True)) == ["sdxl 12 GB", "sdxl 8 GB", "sdxl 16 GB", "sdxl"]
    assert list(fitting(FLUX, 8e9, single_file=True)) == ["flux 12 GB", "flux"]
    assert fitting("SanaPipeline", 12e9, single_file=True) == {"sd35": ("large models", "sd35", None)}
    model = Model(str(tmp_path / "x.safetensors"))
    monkeypatch.setattr(Model, "studio", lambda _: SimpleNamespace(pipe=type(FLUX, (), {})()))
    assert set(model.presets()) == {"flux", "flux 12 GB"}


def test_without_bitsandbytes_no_preset_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "is_installed", lambda package: package != "bitsandbytes")
    assert list(fitting(SDXL, 8e9)) == ["sdxl 16 GB", "sdxl"]
    assert list(fitting(FLUX, 24e9)) == ["flux"]
    assert next(iter(fitting("StableDiffusionPipeline", 8e9))) == "sd15 8 GB"


@pytest.mark.parametrize(
    ("name", "preset", "steps", "guidance", "negative"),
    [
        ("StableDiffusionXLPipeline", "sdxl", 25, 5.0, True),
        ("StableDiffusion3Pipeline", "sd35", 28, 7.0, True),
        ("FluxPipeline", "flux", 28, 3.5, False),
        ("QwenImagePipeline", "sd35", 25, 4.0, True),
    ],
)
def test_a_model_draws_and_trains_with_its_own_steps_and_guidance(
    tmp_path: Path, name: str, preset: str, steps: int, guidance: float, negative: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Model, "memory", lambda _: 80e9)
    session = Session(tmp_path / "work", str(write_tiny_family(name, tmp_path)))
    own, begun = session.abilities, session.training.defaults()
    assert (own.steps, own.guidance) == (begun["sampling_steps"], begun["guidance_scale"]) == (steps, guidance)
    assert next(iter(session.training.runs.presets)) == preset
    assert own.negative == negative
    assert own.image


def test_what_a_model_does_not_know_is_not_asked_for(tmp_path: Path) -> None:
    """Flux.1's guidance leaves no place for a negative prompt, and Krea 2 has no twin that begins with a picture."""
    shown = {}
    for name in ("QwenImagePipeline", "FluxPipeline", "Krea2Pipeline"):
        page = build(Session(tmp_path / name / "work", str(write_tiny_family(name, tmp_path))))
        parts = {key: part for part in page.blocks.values() for key in (part.elem_id, getattr(part, "label", None))}
        fields = ("negative", "compare-negative", "Begin with a picture")
        shown[name] = [parts[field].visible for field in fields]
    assert shown == {
        "QwenImagePipeline": [True, True, True],
        "FluxPipeline": [False, False, True],
        "Krea2Pipeline": [True, True, False],
    }


def test_what_was_distilled_begins_with_few_steps_and_no_guidance(tmp_path: Path) -> None:
    pipe = tiny_family("FluxPipeline", tmp_path)
    pipe.transformer.register_to_config(guidance_embeds=False)
    assert beginning(pipe) == (4, 1.0)


@pytest.mark.parametrize(("able", "wanted"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_trains_in_what_it_computes_in(able: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: able)
    assert Model(device="cuda").precision() == wanted
    assert Model(device="mps").precision() == "no"


def test_the_model_is_loaded_in_a_thread_that_ends(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def load(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return load_pipeline(*given, **named)

    monkeypatch.setattr(model, "load_pipeline", load)
    fresh = Model(session.model.source)
    assert fresh.studio() is fresh.studio()
    [thread] = threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    with pytest.raises(ConfigError, match="nowhere"):
        Model("./nowhere").studio()


@pytest.mark.parametrize(("able", "wanted"), [(True, "bf16"), (False, "no")])
def test_a_processor_trains_in_what_it_computes_in(able: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": able}, raising=False)
    assert Model().precision() == wanted


def test_the_drawing_pipeline_leaves_a_gpu_to_training(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = session.model.studio()
    moved: list[str] = []
    here = torch.device("cuda")
    monkeypatch.setattr(type(studio.pipe), "device", property(lambda _: here))
    monkeypatch.setattr(type(studio.pipe), "to", lambda _, device: moved.append(str(device)))
    studio.rest()
    assert moved == ["cpu"]
    here = torch.device("cpu")
    studio.device = torch.device("cuda")
    studio.rest()
    assert moved == ["cpu"]
    with pytest.raises(Cancelled):
        studio.draw(Request("a mug", (1,), steps=1), cancelled(), lambda _: None)
    assert moved == ["cpu", "cuda"]


def cancelled() -> Job:
    job = Job("somebody", "draw")
    job.cancel()
    return job


def test_a_run_goes_on_only_on_the_model_that_it_was_begun_with(
    session: Session, person: str, model_folder: Path, tmp_path: Path
) -> None:
    session.training.photos(person).add([noise(tmp_path / f"{i}.png", seed=i) for i in range(3)])
    run_id = session.training.runs.prepare(Wish("One", "zwx", "thing", {}), session.training.photos(person))
    other = tmp_path / "other"
    other.symlink_to(model_folder)
    again = Session(session.workspace.root, str(other))
    with pytest.raises(ConfigError, match=r"this run was begun on .*, and this server has .*other"):
        again.training.resume(person, run_id)
    assert again.machine.newest(person, "train") is None
