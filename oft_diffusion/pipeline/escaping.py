"""Texts of users and strangers in a model card: on one line, without paths, and unable to become markup."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_LONGEST = 1000  # characters
# A path that begins a text or follows a space, a quotation mark or the like; its last part is a group.
_PATH = re.compile(
    r"""(?<![^\s"'`(=,;\[])(?:file://)?(?:[A-Za-z]:[\\/]|\\\\|/)[^\s"'`,;)\]]*[\\/]([^\s"'`,;)\]\\/]*)"""
)


def without_local_paths(value: Any) -> Any:
    """Plain JSON types, of whose texts each absolute path is reduced to its last part."""
    if isinstance(value, Mapping):
        return {_pathless(str(key)): without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float)) else _pathless(str(value))


def _pathless(text: str) -> str:
    text = text.encode(errors="ignore").decode()  # half a surrogate pair fits into no file
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _PATH.sub(r"\1", text)


def line(text: object) -> str:
    """One line of printable characters: no control, surrogate or direction mark. Emoji keep their joiners."""
    shown = "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in str(text)[: 4 * _LONGEST])
    return " ".join(shown.split())[:_LONGEST]


def code(text: object) -> str:
    """Markdown that shows a text as it is, whatever it holds: a code span between enough backticks."""
    shown = line(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def plain(text: object) -> str:
    """Markdown that shows a text in running letters: what could be markup becomes an entity."""
    return "".join(f"&#{ord(c)};" if c in string.punctuation and c not in ",-.'!?/" else c for c in line(text))


def python(value: object) -> str:
    """Python that gives a text of one line, or a number."""
    return json.dumps(line(value), ensure_ascii=False) if isinstance(value, str) else repr(value)


def is_repo_id(text: str) -> bool:
    """Whether it is an account and a name, as repositories on the hub have them."""
    return re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9_][\w.\-]{0,95}", text, re.ASCII) is not None
