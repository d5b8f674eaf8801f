"""Class images: made once by the base before it is adapted, counted, seeded, reused; anything else is one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from oft_diffusion.errors import DataError
from oft_diffusion.training import TrainConfig, preflight
from oft_diffusion.training.class_images import RECORD
from tests.helpers.tiny_sd import RESOLUTION, draw_pictures, write_tiny_sd
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]


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
    assert json.loads((tmp_path / "class" / RECORD).read_text())["prompt"] == "a photo of mug"


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


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"class_prompt": "a red mug"}, "prompt 'a photo of mug', now 'a red mug'"),
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
