"""The app's functions, called over the wire by their numbers, as no page would."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import httpx

PERSON = object()  # in the place of who asks


def config_of(client: httpx.Client) -> Any:
    """What the page is made of."""
    return client.get("/config").json()


def pressed(config: Any, button: str) -> tuple[int, list[Any]]:
    """The function behind a button, and what the page shows at first for its inputs; `PERSON` for who asks."""
    components = {c["id"]: c for c in config["components"]}
    [function] = [
        d
        for d in config["dependencies"]
        if any(i in components and components[i]["props"].get("elem_id") == button for i, _ in d["targets"])
    ]
    return function["id"], values_of(config, function)


def values_of(config: Any, function: Any) -> list[Any]:
    """What the page shows at first for a function's inputs; `PERSON` for who asks."""
    components = {c["id"]: c for c in config["components"]}
    inputs = [components[i] for i in function["inputs"]]
    return [PERSON if c["type"] == "browserstate" else c.get("props", {}).get("value") for c in inputs]


def join(client: httpx.Client, session_hash: str, index: Any, data: list[Any]) -> httpx.Response:
    """Ask for a function, in the name of an open page."""
    body = {"fn_index": index, "data": data, "session_hash": session_hash, "event_data": {"index": 10**9}}
    return client.post("/gradio_api/queue/join", json=body)


def call(client: httpx.Client, index: Any, data: list[Any]) -> str:
    """All that the server answers to a call of a function."""
    return call_all(client, [(index, data)])


def call_all(client: httpx.Client, calls: Iterable[tuple[Any, list[Any]]]) -> str:
    """All that the server answers to calls that come at once from one page."""
    session_hash = uuid.uuid4().hex
    answers = [join(client, session_hash, index, data) for index, data in calls]
    refused = [answer.text for answer in answers if answer.status_code != 200]
    left = len(answers) - len(refused)
    lines = []
    if left:
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session_hash}) as told:
            for line in told.iter_lines():
                lines.append(line)
                left -= "process_completed" in line or "unexpected_error" in line
                if left == 0:
                    break
        assert left == 0, "some calls had no answer"
    return "\n".join([*refused, *lines])
