"""The command: who may be served, and what is told when something is missing."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from app.main import AUTH, arguments_of, main
from app.workspace import Workspace
from oft_diffusion import cli
from oft_diffusion.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "would let everyone in the network"),
        (["--host", "192.168.0.2"], "would let everyone in the network"),
        (["--share"], "would let everyone on the internet"),
        (["--auth", "me"], "--auth has 1 that are no pair"),
        (["--host", "0.0.0.0", "--auth", ":secret"], "no pair"),
    ],
)
def test_nobody_is_let_in_by_mistake(
    arguments: list[str], words: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(AUTH, raising=False)
    with pytest.raises(ConfigError, match=words):
        main([*arguments, "--workspace", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("pairs", ["me", ":secret", "me:", "me:secret\n\nyou:secret"])
def test_a_password_without_a_name_lets_nobody_in(pairs: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AUTH, pairs)
    with pytest.raises(ConfigError, match="OFT_AUTH has 1 that are no pair") as told:
        main(["--workspace", str(tmp_path / "work")])
    assert "secret" not in str(told.value)


def test_each_line_is_a_user_and_colons_belong_to_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AUTH, "me:se:cret\nyou: \n")
    pairs = [("me", "se:cret"), ("you", " ")]
    assert arguments_of(["--host", "0.0.0.0"])[1] == pairs
    assert arguments_of(["--host", "0.0.0.0", "--auth", "she:here"])[1] == [("she", "here"), *pairs]


def test_the_verb_reaches_the_app(capsys: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTH, raising=False)
    assert cli.main(["app", "--host", "0.0.0.0", "--workspace", str(tmp_path / "work")]) == 1
    assert "--auth" in capsys.readouterr().err


def test_without_gradio_there_is_one_sentence(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "gradio" else found(name))
    assert cli.main(["app"]) == 1
    assert "pip install 'oft-diffusion[app]'" in capsys.readouterr().err


def test_a_used_port_is_one_sentence(tmp_path: Any) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot be served at 127.0.0.1, port {port}"):
            main(["--port", str(port), "--workspace", str(tmp_path / "work")])
    with Workspace(tmp_path / "work").alone():
        pass  # nothing is left behind
