import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from oft_diffusion import inject_oft, load_oft_weights, save_oft_weights
from oft_diffusion.cli import main
from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation import Evaluation, Row, evaluate, figures, looks_of
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.evaluation.measure import draw_rows
from oft_diffusion.evaluation.prompts import prompt
from oft_diffusion.evaluation.reading import read
from oft_diffusion.generate import Picture
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pocket import SUBJECTS, pocket_pipeline, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.world import ATTRIBUTES, UNCAPTIONED, render, sample_scene, subject_scenes
from tests.helpers.tiny_sd import write_tiny_sd


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
    assert looks.nearest(ImageOps.mirror(images[3])) < 1e-6
    assert looks.nearest(ImageOps.invert(images[3].convert("RGB"))) > 0.1


def test_pictures_of_no_one_subject_are_refused(classifier):
    several = [instance_images(name)[0] for name in ("bow_cat", "party_car", "captain_mug")]
    with pytest.raises(ConfigError, match="disagree on object"):
        looks_of(classifier, several)
    with pytest.raises(ConfigError, match=r"1 instance image\(s\) do not show one subject"):
        looks_of(classifier, several[:1])


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
    how: Any = {"classifier": classifier, "looks": looks, "trigger": "zwx", "count": 2, "steps": 1}
    found = evaluate(pipe, "wild", on_picture=lambda: drawn.append(1), **how)
    assert sum(drawn) == len(found.rows) == 2 * 2 * len(SETS)
    on = {(r.set, r.prompt, r.seed): r for r in found.rows if r.adapted}
    off = {(r.set, r.prompt, r.seed): r for r in found.rows if not r.adapted}
    assert on.keys() == off.keys()
    assert any(on[key].nearest != off[key].nearest for key in on), "the adapter changed nothing"
    saved = json.loads(found.save(tmp_path / "e.json").read_text())
    assert saved["figures"]["subject hit"]["adapted"]["pictures"] == 2
    assert len(saved["rows"]) == len(found.rows)
    names = [line[0] for line in (*found.shares()[1:], *found.differences()[1:])]
    assert sorted(names) == sorted(found.figures)
    assert all(name in found.text() for name in names)
    assert evaluate(pipe, "wild", **how) == found


def side(rows, adapted, **seen):
    """Rows of one picture per value, with or without the adapter."""
    return [
        Row("g/0", name, "a cat", i, adapted, {}, hit, shared, faithful, 1.0)
        for name in SETS
        for i, (hit, faithful, shared) in enumerate(seen.get(name.replace(" ", "_"), [(False, True, 0)] * rows))
    ]


def test_shares_are_told_as_counts_and_preservation_as_a_difference_in_points():
    hits, spoilt = [(True, True, 4)] * 5 + [(False, True, 0)], [(False, True, 0)] * 4 + [(False, False, 3)] * 2
    found = Evaluation(figures([*side(6, True, subject=hits, other=spoilt), *side(6, False)], {"g/0": 0.5}), ())
    shares, differences = ({name: cells for name, *cells in table} for table in (found.shares(), found.differences()))
    assert shares["shares of pictures"] == ["with the adapter", "without it", "difference, points"]
    assert shares["subject hit"][0].startswith("5 of 6: 83 % (")
    assert shares["subject hit"][1].startswith("0 of 6: 0 % (0 to ")
    assert differences["differences to the base"] == ["points", "with the adapter", "without it"]
    points, *sides = differences["preservation"]
    assert points.startswith("-33 (")
    assert sides == ["4 of 6 pictures", "6 of 6 pictures"]
    assert differences["attribute drift"][0].startswith("25 (")
    assert differences["attribute drift"][1:] == ["6 of 24 attributes", "0 of 24 attributes"]
    assert "preservation" not in shares
    assert not any("-0 " in cell for cells in (*shares.values(), *differences.values()) for cell in cells)


def test_decimals_are_told_where_the_pictures_are_enough_for_them():
    def preservation(count):
        lost = [(False, False, 0)] + [(False, True, 0)] * (count - 1)
        rows = [*side(count, True, other=lost), *side(count, False)]
        return dict(row[:2] for row in Evaluation(figures(rows, {"g/0": 0.5}), ()).differences())["preservation"]

    assert preservation(100).startswith("-1 (")
    assert preservation(160).startswith("-0.6 (")


def test_a_picture_of_the_subject_is_a_hit_and_nothing_else_is(classifier, monkeypatch):
    """Drawn by the world instead of by a model, so that what is in each picture is known."""
    scene = replace(SUBJECTS["bow_cat"].scene("city"), colour="green", pattern="plain")
    shown = [scene, replace(scene, hat="none"), replace(scene, object="mug"), replace(scene, background="night")]
    monkeypatch.setattr(
        "oft_diffusion.evaluation.measure.generate", lambda *_, **__: [Picture(render(each), {}) for each in shown]
    )
    looks = looks_of(classifier, instance_images("bow_cat"))
    asked = [prompt("cat", "zwx", colour="green", background="city")] * len(shown)
    rows = draw_rows(None, classifier, looks, {"recoloured": asked}, group="a/0", adapted=True)
    found = [(r.hit, r.shared, r.faithful) for r in rows]
    assert found == [(True, 4, True), (False, 3, True), (False, 4, False), (True, 4, False)]
    assert len({r.seed for r in rows}) == len(rows)


def test_the_verb_prints_and_writes_the_figures(adapter, tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    options = ["--subject", "bow_cat", "--trigger", "zwx", "--count", "1", "--steps", "1", "--out", str(out)]
    assert main(["evaluate", str(adapter), *options]) == 0
    text = capsys.readouterr().out
    assert "a cat with accent magenta, face sleepy, hat bow, badge star" in text
    assert "subject hit" in text
    assert {"subject hit", "prompt fidelity", "preservation", "leakage, other trigger", "memorisation"} <= set(
        json.loads(out.read_text())["figures"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--subject or --instance-dir"),
        (["--subject", "bow_cat", "--instance-dir", "x"], "--subject or --instance-dir"),
        (["--subject", "bow_cat"], "does not say what its trigger is"),
        (["--subject", "bow_cat", "--count", "0"], "--count"),
        (["--instance-dir", "nowhere"], "'nowhere' is no folder"),
        (["--subject", "bow_cat", "--trigger", "zwx", "--steps", "5000"], "the pipeline refuses these settings"),
    ],
)
def test_bad_options_get_one_sentence(adapter, capsys, options, message):
    assert main(["evaluate", str(adapter), *options]) == 1
    error = capsys.readouterr().err
    assert "\nerror: " in f"\n{error}"
    assert message in error
    assert "Traceback" not in error


def test_another_base_and_another_subject_are_refused(adapter, tmp_path, capsys):
    other = write_tiny_sd(tmp_path / "sd")
    assert main(["evaluate", str(adapter), "--subject", "bow_cat", "--model", str(other)]) == 1
    assert "is no base of the pocket world" in capsys.readouterr().err
    mug = resaved(adapter, tmp_path / "mug", trigger="zwx", class_word="mug")
    assert main(["evaluate", str(mug), "--subject", "bow_cat"]) == 1
    assert "trained on a mug, and the images show a cat" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_evaluated_with_a_warning(adapter, tmp_path, capsys):
    base = {"name": "pocket", "components": {"unet": "UNet2DConditionModel"}, "fingerprint": "0" * 64}
    old = resaved(adapter, tmp_path / "old", trigger="zwx", class_word="cat", base=base)
    assert main(["evaluate", str(old), "--subject", "bow_cat", "--count", "1", "--steps", "1"]) == 0
    assert "warning: the adapter was trained on another base" in capsys.readouterr().err


def resaved(adapter, path, **metadata):
    pipe = pocket_pipeline()
    load_oft_weights(pipe, adapter, adapter_name="wild")
    return save_oft_weights(pipe, path, "wild", AdapterMetadata(components={}, **metadata))
