"""TOML and command-line forms of a flat dataclass of knobs. `TrainConfig` is the only one."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from oft_diffusion.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table.

    Raises:
        ConfigError: the file is missing, unreadable or no TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no settings file {path}",
            expected="a TOML file, such as those in train_scripts/configs",
            fix="check the path; relative ones start at the working directory",
        ) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as TOML ({error})",
            expected='lines such as resolution = 512 or trigger = "sks"',
            fix="correct that place",
        ) from error


def write_toml(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Flat TOML, with a comment above each group. Nothing is nested, so no table headers are needed."""
    lines: list[str] = []
    for group, knobs in groups.items():
        present = {knob: value for knob, value in knobs.items() if value is not None}
        lines += [f"# {group}", *(f"{knob} = {_toml_value(value)}" for knob, value in present.items()), ""]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for U+007F, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)  # repr of a float round-trips, and TOML reads 1e-05


def add_arguments(parser: argparse.ArgumentParser, knobs: type, hints: Mapping[str, Any]) -> None:
    """`--config`, then one option per field of the dataclass `knobs`, in argument groups, absent unless given."""
    parser.add_argument("--config", metavar="FILE.toml", help="settings file; options given beside it win")
    groups: dict[str, Any] = {}
    for f in fields(knobs):
        name = f.metadata["group"]
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        hint, default = hints[f.name], f.default
        about = f.metadata["about"].replace("%", "%%")
        if isinstance(default, (str, int, float)) and not isinstance(default, bool):
            about += f" (default: {default})"
        group.add_argument(
            "--" + f.name.replace("_", "-"), dest=f.name, default=argparse.SUPPRESS, help=about, **_option(hint)
        )


def _option(hint: Any) -> dict[str, Any]:
    """How argparse reads a knob of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(get_origin(choice) is tuple for choice in choices):
        return {
            "metavar": "TEXT",
            "nargs": "+" if str in choices else "*",
            "action": _OneOrMore if str in choices else None,
        }
    return {"type": _reader(choices), "metavar": _metavar(choices)}


class _OneOrMore(argparse.Action):
    """One value stays text, several become a tuple."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


def _reader(choices: tuple[Any, ...]) -> Callable[[str], Any]:
    """Text to the first fitting type. What fits none stays text, for `problems()` to name with everything else."""

    def read(text: str) -> Any:
        if type(None) in choices and text.lower() == "none":
            return None
        for kind in (int, float):
            if kind in choices:
                try:
                    return kind(text)
                except ValueError:
                    continue
        return text

    return read


def _metavar(choices: tuple[Any, ...]) -> str:
    words = [w for c in choices for w in (get_args(c) if get_origin(c) is Literal else (_METAVARS.get(c),)) if w]
    return "|".join(words)


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def nearest(name: str, known: Sequence[str]) -> str:
    """The name, quoted, with a known one that resembles it."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name)
