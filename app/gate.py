"""What stands before gradio's own routes: it refuses what this page never asks of them."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from gradio.route_utils import FnIndexInferError
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from oft_diffusion.errors import DataError

from .api import NAMES
from .photos import LARGEST_FILE, MOST
from .room import check_room
from .words import explained
from .workspace import Workspace

_LOG = logging.getLogger(__name__)
# Of gradio's routes those that fetch any address for whoever asks, or write what nobody needs; and every name of a
# function but those for programs: gradio gives names to all, and the page calls its own by number, as "predict".
_CLOSED = re.compile(
    r"/gradio_api/(file[=/]https?://|proxy=|process_recording|deep_link"
    rf"|(call|run|api)/(?!(v2/)?({'|'.join(NAMES)}|predict)(/|$)))"
)
_UPLOAD = re.compile(r"/gradio_api/upload/?$")
_AT_ONCE = f"at most {MOST} files of {LARGEST_FILE // 1_000_000} MB"
_LARGEST = round(1.06 * MOST * LARGEST_FILE)  # of one upload, with what a form says beside its files


class Gate:
    """Lets through what the page and programs need, and uploads for which there is room.

    Attributes:
        coming: bytes of the uploads that are under way.
    """

    def __init__(self, app: ASGIApp, workspace: Workspace) -> None:
        self.app, self.workspace, self.coming = app, workspace, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, and leave the rest to gradio."""
        if scope["type"] == "http" and _CLOSED.match(scope["path"]):
            await _refused("This is not to be had here.", 403)(scope, receive, send)
        elif scope["type"] == "http" and _UPLOAD.match(scope["path"]):
            await self._upload(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = Headers(scope=scope).get("content-length", "")
        size = int(told) if told.isdecimal() else _LARGEST + 1  # for all that may come
        self.coming += size
        try:
            if size > _LARGEST:
                raise DataError("that is too much at once", expected=_AT_ONCE, fix="send fewer, or smaller ones")
            await asyncio.to_thread(check_room, self.workspace, self.coming)
            await self.app(scope, receive, send)
        except DataError as error:
            await _refused(explained(error), 413)(scope, receive, send)
        finally:
            self.coming -= size


def _refused(sentence: str, status: int) -> PlainTextResponse:
    return PlainTextResponse(sentence, status_code=status)


async def _unknown(request: Request, error: Exception) -> PlainTextResponse:
    _LOG.warning("a request for what there is not, to %s: %r", request.url.path, error)
    return _refused("There is no such function here.", 404)


async def _senseless(request: Request, error: Exception) -> PlainTextResponse:
    _LOG.warning("a request that makes no sense, to %s: %r", request.url.path, error)
    return _refused("This request makes no sense.", 400)


def gated(workspace: Workspace) -> dict[str, Any]:
    """How gradio's server is made: with the gate before it, and a sentence where its routes fail at what was sent.

    They look up a function's name or number without a check, and take any field of a form for a file. What goes wrong
    in the functions themselves, gradio answers before that comes here.
    """
    return {
        "middleware": [Middleware(Gate, workspace=workspace)],
        "exception_handlers": {FnIndexInferError: _unknown, KeyError: _unknown, TypeError: _senseless},
    }
