"""One exception family. Every message names the thing, what was expected, and the fix."""

from __future__ import annotations

_LONGEST = 600  # characters of each of an error's parts, where a file may have given them


class OFTError(ValueError):
    """Base of every error that this package raises on purpose.

    Args:
        problem: what is wrong, naming the thing.
        expected: what would have been right.
        fix: what the reader can do about it now.
    """

    def __init__(self, problem: str, *, expected: str, fix: str) -> None:
        self.problem = problem
        self.expected = expected
        self.fix = fix
        super().__init__(f"{_sentence(problem)} Expected: {_sentence(expected)} Fix: {_sentence(fix)}")

    def __reduce__(self) -> tuple[object, ...]:
        # BaseException pickles `args` only, which would lose the three parts (DataLoader workers pickle errors).
        return _rebuild, (type(self), self.problem, self.expected, self.fix)


class ConfigError(OFTError):
    """A setting is outside what it may be."""


class TargetError(OFTError):
    """The layers asked for cannot be adapted, or were bypassed."""


class AdapterError(OFTError):
    """An adapter's name, state or use is wrong."""


class AdapterFileError(OFTError):
    """An adapter file cannot be read, written, or does not fit the model."""

    def __init__(self, problem: str, *, expected: str, fix: str) -> None:
        # What a file calls things may be anything: no line break, escape sequence or megabyte gets into a message.
        super().__init__(_harmless(problem), expected=_harmless(expected), fix=_harmless(fix))


class DataError(OFTError):
    """Instance images, class images or captions are unusable."""


class TrainingError(OFTError):
    """A run cannot start, go on, or be resumed."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line of at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _harmless(text: str) -> str:
    return _shortened("".join(c if c.isprintable() else ascii(c)[1:-1] for c in _shortened(text)))


def _shortened(text: str) -> str:
    third = _LONGEST // 3
    return text if len(text) <= _LONGEST else f"{text[: 2 * third - 5]} ... {text[-third:]}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def _rebuild(cls: type[OFTError], problem: str, expected: str, fix: str) -> OFTError:
    return cls(problem, expected=expected, fix=fix)
