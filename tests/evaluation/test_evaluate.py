import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from oft_diffusion import inject_oft, load_oft_weights, save_oft_weights
from oft_diffusion.cli import main
from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation import evaluate, looks_of
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.evaluation.reading import draw, read
from oft_diffusion.pocket import SUBJECTS, pocket_path, pocket_pipeline, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.world import ATTRIBUTES, UNCAPTIONED, render, sample_scene, subject_scenes


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def pipe():
    pipe = pocket_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def instance_images(name):
    return [Image.open(path) for path in sorted(subjects_path(name).glob("*.png"))]


def test_the_classifier_reads_pictures_that_it_has_never_seen(classifier):
    rng = random.Random("a test's own pictures")
    scenes = [sample_scene(rng) for _ in range(300)]
    readings = read(classifier, [render(scene) for scene in scenes])
    for name in ATTRIBUTES:
        right = sum(r[name] == getattr(s, name) for r, s in zip(readings, scenes, strict=True))
        assert right >= 0.99 * len(scenes), name


def test_the_classifier_reads_other_sizes(classifier):
    scene = subject_scenes(SUBJECTS["bow_cat"], 1)[0]
    [large] = read(classifier, [render(scene, 256)])
    assert large == {name: getattr(scene, name) for name in ATTRIBUTES}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_is_recognised_in_its_shipped_pictures(classifier, name):
    looks, subject = looks_of(classifier, instance_images(name)), SUBJECTS[name]
    assert looks.object == subject.object
    assert looks.colour == subject.colour
    assert looks.uncaptioned == {key: getattr(subject, key) for key in UNCAPTIONED}
    assert set(looks.backgrounds) == {scene.background for scene in subject_scenes(subject)}


def test_distances_to_the_instance_pictures(classifier):
    images = instance_images("bow_cat")
    looks = looks_of(classifier, images)
    assert looks.nearest(images[3]) < 1e-6
    assert looks.closest() > 0.05
    assert looks.nearest(Image.new("RGB", (128, 128))) > looks.closest()
    small = images[0].convert("RGB").resize((128, 128), Image.Resampling.BOX)
    assert looks.nearest(Image.fromarray(255 - np.asarray(small))) > 0.1


def test_pictures_of_no_one_subject_are_refused(classifier):
    several = [instance_images(name)[0] for name in ("bow_cat", "party_car", "captain_mug")]
    with pytest.raises(ConfigError, match="disagree on object"):
        looks_of(classifier, several)
    with pytest.raises(ConfigError, match="1 instance pictures do not show one subject"):
        looks_of(classifier, several[:1])


def test_a_seed_draws_the_same_picture_in_any_batch(pipe):
    prompts, seeds = ["a red mug", "a blue cat in a room", "a fish"], [5, 6, 7]
    one = [image for batch in draw(pipe, prompts, seeds, steps=3, guidance=2.5, batch_size=1) for image in batch]
    all_at_once = [image for batch in draw(pipe, prompts, seeds, steps=3, guidance=2.5) for image in batch]
    for a, b in zip(one, all_at_once, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 2
    assert np.abs(np.asarray(one[0], dtype=int) - np.asarray(one[1], dtype=int)).mean() > 5


@pytest.fixture
def adapter(tmp_path):
    """A file with strong random rotations, which change every picture."""
    pipe = pocket_pipeline()
    bank = inject_oft(pipe.unet, adapter_name="wild")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(0, 0.3)
    return save_oft_weights(pipe, tmp_path / "wild", adapter_name="wild")


def test_evaluation_draws_every_prompt_with_and_without_the_adapter(pipe, classifier, adapter, tmp_path):
    load_oft_weights(pipe, adapter, adapter_name="wild")
    looks = looks_of(classifier, instance_images("bow_cat"))
    drawn: list[int] = []
    found = evaluate(
        pipe, "wild", classifier=classifier, looks=looks, trigger="zwx", count=3, steps=2, on_pictures=drawn.append
    )
    assert sum(drawn) == len(found.rows) == 2 * 3 * len(SETS)
    on = {(r.set, r.prompt, r.seed): r for r in found.rows if r.adapted}
    off = {(r.set, r.prompt, r.seed): r for r in found.rows if not r.adapted}
    assert on.keys() == off.keys()
    assert any(on[key].nearest != off[key].nearest for key in on), "the adapter changed nothing"
    for r in found.rows:
        same = {key: r.reading[key] == value for key, value in looks.uncaptioned.items()}
        assert r.hit == (r.reading["object"] == "cat" and all(same.values()))
    saved = json.loads(found.save(tmp_path / "e.json").read_text())
    assert saved["figures"]["subject hit"]["adapted"]["pictures"] == 3
    assert len(saved["rows"]) == len(found.rows)
    assert "preservation" in found.table()
    again = evaluate(pipe, "wild", classifier=classifier, looks=looks, trigger="zwx", count=3, steps=2)
    assert again == found


def test_the_verb_prints_and_writes_the_figures(adapter, tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    options = ["--subject", "bow_cat", "--trigger", "zwx", "--count", "1", "--steps", "1", "--out", str(out)]
    assert main(["evaluate", str(adapter), *options]) == 0
    text = capsys.readouterr().out
    assert "a cat with accent magenta, face sleepy, hat bow, badge star" in text
    assert "subject hit" in text
    assert set(json.loads(out.read_text())["figures"]) == {
        "subject hit", "prompt fidelity", "preservation", "leakage", "memorisation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--subject or --instance-dir"),
        (["--subject", "bow_cat", "--instance-dir", "x"], "--subject or --instance-dir"),
        (["--subject", "bow_cat"], "does not say what its trigger is"),
        (["--subject", "bow_cat", "--count", "0"], "--count"),
        (["--instance-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_get_one_sentence(adapter, capsys, options, message):
    assert main(["evaluate", str(adapter), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_another_base_is_refused_before_anything_is_drawn(adapter, tmp_path, capsys):
    assert main(["evaluate", str(adapter), "--subject", "bow_cat", "--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    assert pocket_path().is_dir()
