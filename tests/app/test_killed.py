"""A server that is killed in a training: the next one goes on from the last checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.session import Session
from app.workspace import Workspace
from oft_diffusion.training import TrainStep
from oft_diffusion.training.checkpoint import list_checkpoints
from tests.app.test_runs import after, ended, filled
from tests.helpers.app_command import ROOT

__all__ = ["filled"]  # a fixture
SERVER = """
import sys
from pathlib import Path
from app.session import Session
from app.workspace import Workspace
from tests.app.test_runs import wish
root, model, person = sys.argv[1:]
with Workspace(Path(root)).alone():
    wanted = wish(steps=400, checkpoint_every=4, keep_checkpoints=1, validation_every=1000)
    list(Session(Path(root), model).training.start(person, wanted).watch())
"""


@pytest.mark.slow
def test_a_run_outlives_a_server_that_was_killed(filled: Session, person: str, model_folder: Path) -> None:
    root = filled.workspace.root
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, str(root), str(model_folder), person]
    with subprocess.Popen(command, env=environment) as server:
        try:
            while not any(list_checkpoints(run) for run in root.glob("runs/*/run")):
                assert server.poll() is None
                time.sleep(0.01)
        finally:
            server.kill()
    with Workspace(root).alone():  # the lock went with the server
        again = Session(root, str(model_folder))
        [run] = again.training.unfinished(person)
        saved = max(run.checkpoints)
        assert 0 < saved < 400
        going = again.training.resume(person, run.id)
        after(going, saved + 1)
        again.training.stop(person, pause=False)
        last = ended(going)
        again.machine.stop()
    steps = [found.step for found in last.found if isinstance(found, TrainStep)]
    assert steps[0] == saved + 1
    assert [card.name for card in again.shelf.cards()] == ["My thing"]
