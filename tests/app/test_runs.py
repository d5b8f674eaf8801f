"""Training through the app's session: to an adapter on the shelf, stopped, paused, gone on with."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.drawing import Request
from app.machine import Job
from app.packing import COMMAND
from app.runs import Wish
from app.session import Session
from app.workspace import new_token
from oft_diffusion import cli
from oft_diffusion.errors import ConfigError, OFTError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.training import TrainConfig, TrainStep, train
from tests.app.test_photos import noise
from tests.app.test_train_tab import laid_out
from tests.helpers.app_page import occupied

QUICK: dict[str, Any] = {
    "steps": 6, "resolution": 32, "validation_prompts": ["a {trigger} {class_word}"], "validation_every": 3,
    "validation_count": 1, "sampling_steps": 1, "mixed_precision": "no", "batch_size": 1, "checkpoint_every": 2,
    "block_size": 8, "num_class_images": 4,
}  # fmt: skip


@pytest.fixture
def filled(session: Session, person: str, tmp_path: Path) -> Session:
    session.training.photos(person).add([noise(tmp_path / f"{i}.png", seed=i) for i in range(3)])
    return session


def wish(name: str = "My thing", **settings: Any) -> Wish:
    """Six steps on little pictures, or what differs from that."""
    return Wish(name, "zwx", "thing", QUICK | settings)


def ended(job: Job) -> Any:
    *_, last = job.watch(timeout=120)
    assert last.state == "done", last.error
    return last


def test_pictures_become_an_adapter_on_the_shelf(filled: Session, person: str) -> None:
    job = filled.training.start(person, wish())
    now = ended(job)
    *steps, card = now.found
    assert {type(step) for step in steps} == {TrainStep}
    assert steps[-1].step == 6
    assert (card.name, card.trigger, card.class_word) == ("My thing", "zwx", "thing")
    assert card.cover is not None
    assert [c.id for c in filled.shelf.cards()] == [card.id]
    assert filled.fits(card) == ""
    assert filled.training.unfinished(person) == []
    assert filled.training.runs.config_of(job.about).steps == 6


def scarce(*_: Any, **__: Any) -> Any:
    raise MemoryError


def listened(job: Job, listen: Callable[[str], object]) -> Job:
    """A job that waits, whose texts are listened to."""
    tell = job.tell

    def tell_both(*found: Any, **changes: Any) -> None:
        tell(*found, **changes)
        listen(changes.get("text", ""))

    job.tell = tell_both  # type: ignore[method-assign]
    return job


def after(job: Job, step: int) -> None:
    """Wait until a step was told."""
    for now in job.watch(timeout=120):
        assert not now.ended, now.error
        if any(isinstance(found, TrainStep) and found.step >= step for found in now.found):
            return


@pytest.mark.slow
def test_an_adapter_whose_cover_fails_is_there_without_one(
    filled: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filled.model, "portrait", lambda *_: [][0])
    *_, unforeseen, _ = ended(filled.training.start(person, wish())).found
    assert unforeseen.startswith("My thing has no cover: Something went wrong that nobody foresaw")
    monkeypatch.setattr(filled.model, "portrait", scarce)
    now = ended(filled.training.start(person, wish("Another")))
    *_, note, card = now.found
    assert note.startswith("Another has no cover: There is not enough memory for this.")
    assert (card.name, card.cover, now.text) == ("Another", None, "the adapter Another is on the shelf")
    assert [card.name for card in filled.shelf.cards()] == ["Another", "My thing"]
    assert filled.training.unfinished(person) == []


def test_a_cover_is_cancelled_within_a_step_and_the_adapter_stays(filled: Session, person: str) -> None:
    training, told = filled.training, list[str]()

    def interrupt(text: str) -> None:
        if text.startswith("drawing a cover: step"):
            told.append(text)
            assert [run.done for run in training.mine(person)] == [True]
            filled.machine.cancel(person, job.id)

    with occupied(filled.machine):
        job = listened(training.start(person, wish()), interrupt)
    *_, note, card = ended(job).found
    assert note == "My thing has no cover: drawing it was cancelled"
    assert (len(told), card.cover, job.progress.text) == (1, None, "the adapter My thing is on the shelf")


def test_while_a_cover_is_drawn_there_is_nothing_to_stop(
    filled: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, free = filled.training, threading.Event()
    monkeypatch.setattr(filled.model, "portrait", lambda *_: free.wait(60) and Image.new("RGB", (8, 8)))
    tab = laid_out(filled)
    training.start(person, wish(validation_every=100))
    enabled = [tab.shown.index(button) for button in (tab.stop, tab.pause, tab.sample, tab.save)]
    seen = set[tuple[bool, ...]]()
    for shown in tab._follow(person):
        now = tuple(shown[place]["interactive"] for place in enabled)
        seen.add(now)
        if "Drawing a cover" in shown[0]:
            assert now == (False,) * 4
            assert training.stop(person, pause=True) == training.ask(person, "save") == "Nothing is being trained"
            free.set()
    assert free.is_set()
    assert (True,) * 4 in seen
    assert [(card.name, card.cover is None) for card in filled.shelf.cards()] == [("My thing", False)]


def test_a_paused_run_goes_on_after_the_server_was_gone(filled: Session, person: str, model_folder: Path) -> None:
    job = filled.training.start(person, wish(steps=400, checkpoint_every=1000, validation_every=1000))
    after(job, 2)
    filled.training.stop(person, pause=True)
    assert ended(job).text.startswith("paused at step")
    assert filled.shelf.cards() == []
    [run] = filled.training.unfinished(person)
    assert (run.name, run.steps) == ("My thing", 400)
    again = Session(filled.workspace.root, str(model_folder))
    [same] = again.training.unfinished(person)
    assert same == run
    going = again.training.resume(person, run.id)
    after(going, run.step + 1)
    again.training.stop(person, pause=False)
    *steps, card = ended(going).found
    assert steps[0].step > run.step
    assert card.name == "My thing"
    assert again.training.unfinished(person) == []


@pytest.mark.thinned(2)
@pytest.mark.parametrize("pause", [True, False])
def test_a_run_is_ended_while_its_class_images_are_made(
    filled: Session, person: str, busy: threading.Event, pause: bool
) -> None:
    job = filled.training.start(person, wish(num_class_images=8))
    assert filled.training.unfinished(person) == []  # it is under way
    told: list[str] = []

    def end(text: str) -> None:
        told.append(text)
        if text == "preparing class images, 0 of 2":
            filled.training.stop(person, pause=pause)

    listened(job, end)
    busy.set()
    *_, last = job.watch(timeout=120)
    assert "preparing class images, 1 of 2" not in told
    assert last.state == "cancelled"
    assert last.text == f"{'paused' if pause else 'stopped'} before the first step"
    assert filled.shelf.cards() == []
    left = filled.training.unfinished(person)
    assert [(run.step, run.steps) for run in left] == [(0, 6)] * pause
    if left:
        assert ended(filled.training.resume(person, left[0].id)).found[-1].name == "My thing"
        assert filled.training.unfinished(person) == []


def test_what_fails_at_once_is_not_to_be_gone_on_with(filled: Session, person: str) -> None:
    *_, last = filled.training.start(person, wish(weight_decay=-1.0)).watch(timeout=60)
    assert last.state == "failed"
    assert "weight_decay" in last.error
    assert filled.training.unfinished(person) == []


def test_a_run_is_paused_as_the_server_ends(filled: Session, person: str, model_folder: Path) -> None:
    job = filled.training.start(person, wish(steps=400, checkpoint_every=1000, validation_every=1000))
    after(job, 2)
    filled.machine.stop()
    assert job.progress.text.startswith("paused at step")
    again = Session(filled.workspace.root, str(model_folder))
    [run] = again.training.unfinished(person)
    assert 2 <= run.step < 400
    assert again.shelf.cards() == []


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    filled: Session, person: str, model_folder: Path
) -> None:
    run_id = filled.training.runs.prepare(wish(), filled.training.photos(person))
    again = Session(filled.workspace.root, str(model_folder))
    [run] = again.training.unfinished(person)
    assert (run.id, run.step, run.checkpoints) == (run_id, 0, {})
    assert again.training.runs.with_checkpoints() == []
    going = again.training.resume(person, run_id)
    with pytest.raises(ConfigError, match="no such run"):  # a second click
        again.training.resume(person, run_id)
    with pytest.raises(ConfigError, match="training already"):
        again.training.start(person, wish())
    assert [run.name for run in again.workspace.runs.iterdir()] == [run_id]
    assert ended(going).found[-1].name == "My thing"


@pytest.mark.slow
def test_nobody_sees_or_stops_what_another_began(filled: Session, person: str, busy: threading.Event) -> None:
    other, training = new_token(), filled.training
    job, asked = training.start(person, wish()), training.estimate(person, wish())
    for pause in (True, False):
        training.stop(other, pause=pause)
    for kind in ("train", "estimate"):
        filled.machine.cancel_all(other, kind)
        assert filled.machine.newest(other, kind) is None
    assert not filled.machine.cancel(other, job.id)
    assert training.photos(other).count() == 0
    for take in (training.packed, training.settings_of):
        with pytest.raises(ConfigError, match="no such run"):
            take(other, job.about)
    busy.set()
    assert ended(job).found[-1].name == "My thing"
    assert ended(asked).found


@pytest.mark.slow
def test_a_run_is_gone_on_with_by_whoever_began_it_alone(filled: Session, person: str) -> None:
    job = filled.training.start(person, wish("Mine", steps=60))
    after(job, 12)  # the first checkpoint
    filled.training.stop(person, pause=True)
    ended(job)
    [run] = filled.training.unfinished(person)
    other = new_token()
    assert filled.training.unfinished(other) == []
    with pytest.raises(ConfigError, match="no such run"):
        filled.training.resume(other, run.id)
    with pytest.raises(ConfigError, match="no such run"):
        filled.training.packed(other, run.id)
    assert ended(filled.training.resume(person, run.id)).found[-1].name == "Mine"


def test_a_name_that_no_adapter_can_have_is_refused_before_anything_is_trained(filled: Session, person: str) -> None:
    with pytest.raises(ConfigError, match="a name of 61 letters"):
        filled.training.start(person, wish("x" * 61))
    assert filled.training.runs.earlier() == []
    assert filled.shelf.cards() == []


def test_saving_and_drawing_when_asked(filled: Session, person: str) -> None:
    training = filled.training
    assert training.ask(person, "save") == training.stop(person, pause=True) == "Nothing is being trained"
    job = training.start(person, wish(steps=400, checkpoint_every=1000, validation_every=1000))
    after(job, 2)
    assert training.ask(new_token(), "save") == "Nothing is being trained"
    assert training.ask(person, "sample") == "Asked: pictures are drawn after this step"
    assert training.ask(person, "save") == "Asked: a checkpoint is saved after this step"
    after(job, job.progress.found[-1].step + 10)
    assert training.stop(person, pause=False) == "It ends after this step, and the adapter is kept"
    said = [found for found in ended(job).found if isinstance(found, str)]
    drew, saved = said
    step = drew.rpartition(" ")[2]
    assert (drew, saved) == (f"Drew pictures after step {step}", f"Saved a checkpoint after step {step}")
    folder = next(filled.workspace.runs.iterdir()) / "run"
    assert len(list((folder / "samples").glob("*.png"))) >= 2
    assert len(list(folder.glob("checkpoint-*"))) == 2


def test_a_run_that_is_stopped_while_it_prepares_to_go_on_can_still_be_gone_on_with(
    filled: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = filled.training
    job = training.start(person, wish(steps=400, checkpoint_every=1000, validation_every=1000))
    after(job, 2)
    training.stop(person, pause=True)
    ended(job)
    [run] = training.unfinished(person)
    reusing = training.runs._reusing

    def stopped(config: TrainConfig) -> TrainConfig:
        training.stop(person, pause=False)
        return reusing(config)

    monkeypatch.setattr(training.runs, "_reusing", stopped)
    *_, last = training.resume(person, run.id).watch(timeout=120)
    assert last.state == "cancelled"
    assert last.text == f"stopped at step {run.step}, before it went on: it can still be gone on with"
    assert training.unfinished(person) == [run]


@pytest.mark.slow
def test_class_images_are_made_once_for_runs_that_want_the_same(filled: Session, person: str) -> None:
    def made(**settings: Any) -> list[str]:
        told: list[str] = []
        job = filled.training.start(person, wish(steps=1, prior_preservation=True, **settings))
        listened(job, told.append)
        assert ended(job).found
        return [text for text in told if text.startswith("preparing class images")]

    assert made()
    assert not made(name="Another")
    runs = filled.training.runs
    folders = {
        runs._reusing(runs.config(wish(prior_preservation=True, seed=seed), Path())).class_dir for seed in (0, 0, 1)
    }
    assert len(folders) == 2
    [present] = filled.workspace.root.glob("class_images/*")
    assert str(present) in folders
    newest, _ = filled.training.mine(person)
    assert "class_dir" not in filled.training.settings_of(person, newest.id).read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 10**6}, {"steps": 0}, {"block_size": 4096}, {"learning_rate": 5.0}, {"batch_size": 10**4},
        {"validation_prompts": ["a"] * 13}, {"validation_prompts": ["a" * 501]},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_keep_the_machine_too_long_is_refused(filled: Session, person: str, settings: Any) -> None:
    for act in (filled.training.start, filled.training.estimate, filled.training.packed):
        with pytest.raises(ConfigError, match=r"= |13 prompts|a text too long"):
            act(person, wish(**settings))
    assert filled.training.runs.earlier() == []


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": " "}, "a name is missing"),
        ({"trigger": ""}, "a trigger is missing"),
        ({"class_word": ""}, "a class word is missing"),
    ],
)
def test_what_is_not_filled_in_is_said_at_once(filled: Session, person: str, changed: Any, words: str) -> None:
    told = {"name": "My thing", "trigger": "zwx", "class_word": "thing", "settings": QUICK} | changed
    with pytest.raises(ConfigError, match=words):
        filled.training.start(person, Wish(**told))


def test_without_pictures_there_is_no_run(session: Session, person: str) -> None:
    with pytest.raises(ConfigError, match="fewer than two pictures"):
        session.training.start(person, wish())
    for run in ("", "../x", "0" * 16):
        with pytest.raises(OFTError):
            session.training.resume(person, run)


def test_a_grid_of_checkpoints_and_strengths(filled: Session, person: str) -> None:
    ended(filled.training.start(person, wish()))
    [run] = filled.training.runs.earlier()
    assert run.done
    assert list(run.checkpoints) == sorted(run.checkpoints)
    assert len(run.checkpoints) > 2
    assert filled.training.comparable(person) == run.id
    assert filled.training.comparable(new_token()) == ""
    request = Request("a zwx thing", (1, 2), steps=1)
    [sheet] = ended(filled.comparing.run_grid(person, request, run.id, (0.0, 1.0))).found
    told = filled.settings_in(sheet)
    assert told["rows"] == [f"My thing, step {step}, at {s}" for step in run.checkpoints for s in (0, 1)]
    assert told["seeds"] == [1, 2]
    with pytest.raises(ConfigError, match="no such run"):
        filled.comparing.run_grid(person, request, "0" * 16)


def test_what_is_packed_trains_the_same_elsewhere(
    filled: Session, person: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.training.photos(person).describe(filled.training.photos(person).look(32)[1].id, "a red thing")
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(filled.training.packed(person, wish())) as archive:  # before anything is trained
        assert str(filled.workspace.root) not in archive.read("config.toml").decode()
        archive.extractall(elsewhere)
    monkeypatch.chdir(elsewhere)
    assert (elsewhere / "photos" / "02.txt").read_text() == "a red thing"
    with train(TrainConfig.from_toml(Path("config.toml")), progress=False) as run:
        assert len(list(run)) == 6
    job = filled.training.start(person, wish())
    card = ended(job).found[-1]
    assert load_adapter_file(run.result.adapter).metadata.sha256 == load_adapter_file(card.file).metadata.sha256
    with zipfile.ZipFile(filled.training.packed(person, job.about)) as archive:
        assert TrainConfig.from_toml(Path(archive.extract("config.toml"))).steps == 6
        assert "photos/02.txt" in archive.namelist()


def test_the_command_line_works_in_the_folder_that_was_unpacked(
    filled: Session, person: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with zipfile.ZipFile(filled.training.packed(person, wish(""))) as archive:
        archive.extractall(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    program, *arguments = COMMAND.split()
    assert program == "oft-diffusion"
    assert cli.main([*arguments, "--estimate"]) == 0
    assert "6 steps" in capsys.readouterr().out
    alone = filled.training.settings_of(person, wish())
    assert alone.read_text() == Path("config.toml").read_text()
    assert "name the one on yours" in alone.read_text()  # its model is a folder
    filled.training.photos(person).clear()
    with pytest.raises(ConfigError, match="no pictures to pack"):
        filled.training.packed(person, wish())


def test_settings_follow_the_length_of_a_run(filled: Session) -> None:
    runs = filled.training.runs
    preset = runs.config(Wish("", "", "", {}), Path())
    longer = runs.config(Wish("", "", "", {"steps": 2 * preset.steps}), Path())
    assert (longer.warmup_steps, longer.decay_steps) == (2 * preset.warmup_steps, 2 * preset.decay_steps)
    with pytest.raises(ConfigError, match="no such preset"):
        runs.config(Wish("", "", "", {}, "../../etc/passwd"), Path())
