"""The folder in which everything goes by ids that the server made."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app.main import main
from app.workspace import Workspace, is_token, new_id, new_token
from oft_diffusion.errors import ConfigError, DataError

HOSTILE = [
    "", "..", "../../etc/passwd", "/etc/passwd", "a" * 16 + "/..", "0" * 15, "0" * 17, "0" * 15 + "G", "0" * 16 + "\n",
    "%2e%2e", "0" * 15 + "\0", None, 7, ["0" * 16], {"path": "/etc/passwd"},
]  # fmt: skip


@pytest.mark.parametrize("given", HOSTILE, ids=repr)
def test_what_a_browser_sends_becomes_no_path(tmp_path: Path, given: Any) -> None:
    workspace = Workspace(tmp_path / "work")
    before = sorted(tmp_path.rglob("*"))
    for place in (workspace.adapter, workspace.run, workspace.pictures, workspace.uploads):
        with pytest.raises(DataError):
            place(given)
    assert not is_token(given)
    assert sorted(tmp_path.rglob("*")) == before


def test_ids_are_new_each_time_and_sort_by_time(tmp_path: Path) -> None:
    ids = [new_id() for _ in range(100)]
    assert len(set(ids)) == 100
    time.sleep(0.001)
    assert new_id() > max(ids)
    workspace = Workspace(tmp_path)
    assert {workspace.adapter(i).parent for i in ids} == {workspace.adapters}
    assert is_token(new_token())
    people = {new_token() for _ in range(10)}
    assert len({workspace.pictures(token) for token in people}) == 10


def test_old_uploads_and_copies_are_cleaned_away(tmp_path: Path) -> None:
    workspace, token = Workspace(tmp_path), new_token()
    uploads = workspace.uploads(token)
    for name in ("old.png", "new.png"):
        (uploads / name).touch()
    (uploads / "old").mkdir()
    yesterday = time.time() - 25 * 3600
    for name in ("old.png", "old"):
        os.utime(uploads / name, (yesterday, yesterday))
    (workspace.pictures(token) / "old.png").touch()
    os.utime(workspace.pictures(token) / "old.png", (yesterday, yesterday))
    (workspace.temporary / "copy").mkdir()
    workspace.clean()
    assert [path.name for path in uploads.iterdir()] == ["new.png"]
    assert [path.name for path in workspace.pictures(token).iterdir()] == ["old.png"]
    assert list(workspace.temporary.iterdir()) == []


def test_what_is_temporary_stays_for_a_day_while_a_server_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, ended = Workspace(tmp_path), threading.Event()
    old, waits = workspace.fresh(), iter((False, False, True))
    monkeypatch.setattr(ended, "wait", lambda seconds: next(waits))
    workspace.keep_clean(ended)
    assert list(workspace.temporary.iterdir()) == [old]
    now, waits = time.time(), iter((False, True))
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    workspace.keep_clean(ended)
    assert list(workspace.temporary.iterdir()) == []


def test_two_servers_in_one_workspace_are_refused(tmp_path: Path) -> None:
    first, second = Workspace(tmp_path), Workspace(tmp_path)
    with first.alone():
        copy = first.fresh()
        with pytest.raises(ConfigError, match="another server works in"), second.alone():
            raise AssertionError
        with pytest.raises(ConfigError, match="another server works in"):
            main(["--workspace", str(tmp_path)])
        assert copy.is_dir()
    with second.alone():
        pass


def test_a_workspace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        Workspace(tmp_path / "file")
