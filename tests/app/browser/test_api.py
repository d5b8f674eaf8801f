"""The two endpoints that have names, as a program calls them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradio import Error
from gradio_client import Client

from app.api import Api
from oft_diffusion.images import read_settings
from tests.helpers.app_page import occupied, pixels, until

DOCS = Path(__file__).parents[3] / "docs" / "app.md"


def test_a_program_draws_with_an_adapter(server: Any, tmp_path: Path) -> None:
    _, url = server
    client = Client(url, verbose=False, download_files=str(tmp_path))
    [mug] = client.predict(api_name="/adapters")
    assert (mug["name"], mug["trigger"], mug["class_word"]) == ("My mug", "sks", "mug")
    drawn = []
    for strength in (1.0, 0.0):
        picture, settings = client.predict(
            prompt="a sks mug", adapter=mug["id"], strength=strength, seed=5, steps=2, api_name="/draw"
        )
        assert settings["seed"] == 5
        assert read_settings(picture)["prompt"] == "a sks mug"
        drawn.append(pixels(Path(picture)))
    assert not np.array_equal(*drawn)


def test_the_example_of_the_docs_runs(server: Any) -> None:
    [example] = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert example.count("http://127.0.0.1:7860") == 1
    ran: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:7860", server[1]), ran)  # noqa: S102 - our own text
    assert ran["settings"]["prompt"] == "a sks mug on the beach"
    assert ran["settings"]["adapters"][0]["name"] == "My mug"
    assert read_settings(ran["picture"]) == ran["settings"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"adapter": "../../../etc/passwd"}, "no such thing"),
        ({"steps": 10_000}, "10000 steps"),
        ({"seed": -1}, "seed out of range"),
    ],
)
def test_what_is_wrong_is_said_in_words(server: Any, asked: dict[str, Any], words: str) -> None:
    client = Client(server[1], verbose=False)
    with pytest.raises(Exception, match=words):
        client.predict(prompt="a mug", api_name="/draw", **asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"guidance": float("nan")}, "Nan as guidance"),
        ({"strength": 1e30}, r"1e\+30 as strength of My mug"),
        ({"strength": float("nan")}, "Nan as strength of My mug"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"steps": float("inf")}, "Something in the form"),
    ],
)
def test_numbers_that_are_none_are_refused(server: Any, asked: dict[str, Any], words: str) -> None:
    """Some of these no JSON of gradio's own client can hold."""
    session, _ = server
    [mug] = session.fitting()
    call: Any = Api.draw
    with pytest.raises(Error, match=f"(?i){words}"):
        call(SimpleNamespace(session=session), **{"prompt": "a mug", "adapter": mug.id, **asked})


def test_a_program_that_asks_without_end_is_refused(server: Any) -> None:
    session, url = server
    with occupied(session.machine):
        clients = [Client(url, verbose=False) for _ in range(10)]  # each with a name of its own for itself
        calls = [client.submit(prompt="a mug", steps=1, api_name="/draw") for client in clients]
        until(lambda: sum(call.done() for call in calls) == 2)
        refused = [str(call.exception()) for call in calls if call.done()]
    assert all("8 of your jobs are waiting already" in words for words in refused), refused
    assert all(call.result()[1]["prompt"] == "a mug" for call in calls if not call.done() or not call.exception())


@pytest.mark.slow  # gradio looks every fifteen seconds who is there
def test_what_a_program_asked_for_is_not_drawn_once_it_has_gone(server: Any) -> None:
    session, url = server
    with occupied(session.machine):
        stays, leaves = (Client(url, verbose=False) for _ in range(2))
        call, _ = (client.submit(prompt="a mug", steps=1, api_name="/draw") for client in (stays, leaves))
        until(lambda: len(session.machine.going("program")) == 2)
        leaves.close()
        until(lambda: len(session.machine.going("program")) == 1)
    assert call.result()[1]["prompt"] == "a mug"


def test_nothing_else_has_a_name(server: Any) -> None:
    named = Client(server[1], verbose=False).view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/adapters", "/draw"}
