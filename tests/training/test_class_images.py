"""Class images: made once by the base before it is adapted, counted, seeded, reused; anything else is one error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from oft_diffusion.errors import DataError
from oft_diffusion.evaluation.prompts import OTHER_TRIGGERS, near
from oft_diffusion.pocket import SUBJECTS, subjects_path
from oft_diffusion.training import TrainConfig, preflight
from oft_diffusion.training.class_images import RECORD, twin_pictures
from oft_diffusion.training.data import instance_pictures
from tests.helpers.tiny_sd import RESOLUTION, draw_pictures, write_tiny_sd
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]
POCKET = Path(__file__).parents[2] / "train_scripts" / "configs" / "pocket.toml"


@pytest.fixture
def prior(config: Config, tmp_path: Path) -> Config:
    def make(**knobs: object) -> TrainConfig:
        small = {"prior_preservation": True, "num_class_images": 3, "class_dir": str(tmp_path / "class"), "steps": 1}
        return config(**(small | {"overwrite": True} | knobs))

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.png"))}


def test_made_once_and_reused(prior: Config, run: Run, tmp_path: Path) -> None:
    run(prior())
    made = contents(tmp_path / "class")
    assert list(made) == [f"class_{i:05d}.png" for i in range(3)]
    assert len(set(made.values())) == 3
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "class").iterdir())]
    run(prior(learning_rate=1e-2))
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "class").iterdir())] == times
    assert json.loads((tmp_path / "class" / RECORD).read_text())["prompts"] == ["a photo of mug"]


def test_a_set_grows_and_is_completed(prior: Config, run: Run, tmp_path: Path) -> None:
    run(prior(num_class_images=6))
    whole = contents(tmp_path / "class")
    for name in ("class_00001.png", "class_00004.png", "class_00005.png"):
        (tmp_path / "class" / name).unlink()
    assert preflight(prior(num_class_images=6)).notes[-1] == "class images: 3 reused, 3 to be made"
    run(prior(num_class_images=6))
    assert contents(tmp_path / "class").keys() == whole.keys()
    assert contents(tmp_path / "class")["class_00000.png"] == whole["class_00000.png"]
    plan = preflight(prior(num_class_images=2))
    assert plan.class_images is not None
    assert len(plan.class_images.paths) == 2


def test_they_come_from_the_base_even_where_an_adapter_is_given(prior: Config, run: Run, tmp_path: Path) -> None:
    _, first = run(prior(steps=3, learning_rate=0.1))
    run(prior(class_dir=str(tmp_path / "again"), init_adapter=str(first.adapter), output_dir=str(tmp_path / "b")))
    assert contents(tmp_path / "class") == contents(tmp_path / "again")


def test_default_folder(config: Config, run: Run) -> None:
    _, result = run(config(prior_preservation=True, num_class_images=1, steps=1))
    assert list(contents(result.adapter.parent / "class_images")) == ["class_00000.png"]


def test_own_images_are_used_as_they_are(prior: Config, run: Run, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "class", count=4, suffix=".jpg")
    plan = preflight(prior())
    assert plan.notes[-1].endswith("holds 4 images of your own; they are used as class images")
    run(prior())
    assert contents(tmp_path / "class") == {}


def test_prompts_take_turns(prior: Config, run: Run, tmp_path: Path) -> None:
    run(prior(class_prompts=("a {class_word}",)))
    alone = contents(tmp_path / "class")
    folder = str(tmp_path / "several")
    settings = prior(class_prompts=("a {class_word}", "a cat"), class_dir=folder)
    plan = preflight(settings)
    assert plan.class_images is not None
    assert plan.class_images.prompts == ("a mug", "a cat", "a mug")
    run(settings)
    several = contents(tmp_path / "several")
    assert [several[name] == alone[name] for name in sorted(several)] == [True, False, True]  # of the same seeds


def test_own_captions_are_used(prior: Config, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "class", count=2)
    (tmp_path / "class" / "picture_1.txt").write_text("a blue\nboat")
    plan = preflight(prior(class_prompts=("a {class_word}", "a cat")))
    assert plan.class_images is not None
    assert plan.class_images.prompts == ("a mug", "a blue boat")
    (tmp_path / "class" / "picture_0.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"picture_0.txt is not UTF-8"):
        preflight(prior())


def test_twins_are_the_instance_images_without_their_trigger(prior: Config, run: Run, pictures: Path) -> None:
    settings = prior(prior_target="base", prior_twins=3)
    instances = preflight(settings).pictures
    twins = twin_pictures(instances, settings)
    assert [t.path for t in twins] == [p.path for p in instances for _ in range(3)]
    assert [t.prompt for t in twins[::3]] == ["a photo of mug"] * len(instances)
    words = [match[1] if (match := re.fullmatch(r"a photo of (\w+) mug", t.prompt)) else "" for t in twins]
    rare, near = words[1::3], words[2::3]
    assert all(2 <= len(word) <= 4 and word != "sks" for word in rare)
    assert len(set(rare)) > 1
    # words that begin as the trigger does must not do, either
    assert all(len(word) == 3 and word[0] == "s" and word != "sks" for word in near)
    assert len(set(near)) > 1
    assert twins == twin_pictures(instances, settings)
    assert twins != twin_pictures(instances, prior(prior_target="base", prior_twins=3, seed=1))
    steps, _ = run(settings)
    assert steps[0].prior_loss is not None


def test_twins_of_the_shipped_subjects_never_wear_a_trigger_that_the_evaluation_asks_with() -> None:
    for name, seed in product(SUBJECTS, (0, 1)):
        own = {"instance_dir": str(subjects_path(name)), "class_word": SUBJECTS[name].object, "seed": seed}
        settings = TrainConfig.from_toml(POCKET, own)
        twins = twin_pictures(instance_pictures(settings)[0], settings)
        assert len(twins) == 5 * settings.prior_twins
        said = {word for twin in twins for word in twin.prompt.split()}
        assert not said & {*OTHER_TRIGGERS, near(settings.trigger), settings.trigger}, name


def test_own_images_are_looked_at_first(prior: Config, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "class", count=3)
    (folder / "picture_1.png").write_bytes((folder / "picture_1.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"1 of 3 class images in .*: picture_1.png cannot be decoded"):
        preflight(prior())


def test_the_subject_is_no_class_image(prior: Config, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pictures)
    for folder in (pictures, tmp_path / "link", pictures / ".." / pictures.name):
        with pytest.raises(DataError, match="class_dir and instance_dir are the same folder"):
            preflight(prior(class_dir=str(folder)))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"class_prompts": ("a red mug",)}, "prompts ['a photo of mug'], now ['a red mug']"),
        ({"seed": 4}, "seed 0, now 4"),
        ({"resolution": RESOLUTION + 2}, "resolution 16, now 18"),
        ({"guidance_scale": 1.0, "sampling_steps": 5}, "sampling_steps 2, now 5; guidance_scale 7.5, now 1.0"),
    ],
)
def test_other_settings_are_refused(knobs: dict[str, object], sentence: str, prior: Config, run: Run) -> None:
    run(prior(num_class_images=1))
    with pytest.raises(DataError) as caught:
        preflight(prior(num_class_images=1, **knobs))
    assert sentence in str(caught.value)
    assert "choose another class_dir" in str(caught.value)


def test_another_model_and_a_broken_record_are_refused(prior: Config, run: Run, tmp_path: Path) -> None:
    run(prior(num_class_images=1))
    other = write_tiny_sd(tmp_path / "other", seed=3)
    with pytest.raises(DataError, match="made with other settings: model"):
        preflight(prior(num_class_images=1, model=str(other)))
    (tmp_path / "class" / RECORD).write_text("[")
    with pytest.raises(DataError, match="delete that file to use the images as they are"):
        preflight(prior())
