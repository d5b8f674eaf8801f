"""The figures, from rows that say what is in each picture. docs/evaluation.md tells what each is good for.

- *subject hit*: the object and all uncaptioned attributes of the subject are read right in one picture, on backgrounds
  that its instance images do not have.
- *prompt fidelity*: all captioned attributes that the prompt names are read right, for the subject in colours and on
  backgrounds that its instance images do not have; against the base's on the same prompts and seeds.
- *hit and fidelity*: both in the same picture, on those prompts.
- *preservation*: prompt fidelity on prompts without the subject, minus the base's on the same prompts and seeds.
- *attribute drift*: on those prompts, the share of the subject's uncaptioned attributes that turn up, minus the base's.
- *leakage*: subject hits where another trigger is given, an unrelated made-up word as long as the trained one, or only
  the class word; on the same prompts the attribute drift, which tells of subjects that come halfway.
- *memorisation*: pictures of the subject that are nearer to an instance image than these are to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from oft_diffusion.evaluation.intervals import Interval, difference_interval, mean_interval, ratio_interval
from oft_diffusion.evaluation.reading import Reading

SETS = ("subject", "recoloured", "other", "other trigger", "long trigger", "class word")


@dataclass(frozen=True)
class Row:
    """One picture.

    Attributes:
        group: the run that it belongs to, from the outside in, such as "captain_mug/0"; intervals resample level by
            level.
        set: which of `SETS` its prompt is of.
        prompt: its text.
        seed: of its noise.
        adapted: whether the adapter was on.
        reading: what the classifier saw.
        hit: whether the subject is in it.
        shared: how many of the subject's uncaptioned attributes are in it, 0 to 4.
        faithful: whether it shows everything that the prompt names.
        nearest: root mean square distance to the nearest instance image, pixels from 0 to 1.
    """

    group: str
    set: str
    prompt: str
    seed: int
    adapted: bool
    reading: Reading
    hit: bool
    shared: int
    faithful: bool
    nearest: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `Row(**row.to_json())` is the row again."""
        return asdict(self)


class Figure(NamedTuple):
    """One figure: shares of pictures, from 0 to 1, with the adapter and without it.

    Attributes:
        adapted: with the adapter.
        base: without it, on the same prompts and seeds.
        difference: of the two, pair by pair.
        ratio: of the two; None where the base's is zero.
    """

    adapted: Interval
    base: Interval
    difference: Interval
    ratio: Interval | None


def figures(rows: Sequence[Row], closest_instances: Mapping[str, float]) -> dict[str, Figure]:
    """All figures over the rows of one or more runs.

    Args:
        rows: for each prompt and seed one row with the adapter and one without.
        closest_instances: per group, the distance between the two instance images that are most alike.

    Raises:
        ValueError: a set has no rows, or a row has no partner.
    """

    def hit(row: Row) -> float:
        return float(row.hit)

    def faithful(row: Row) -> float:
        return float(row.faithful)

    def copied(row: Row) -> float:
        return float(row.nearest < closest_instances[row.group])

    def shared(row: Row) -> float:
        return row.shared / 4

    return {
        "subject hit": _figure(rows, "subject", hit),
        "prompt fidelity": _figure(rows, "recoloured", faithful),
        "hit and fidelity": _figure(rows, "recoloured", lambda row: float(row.hit and row.faithful)),
        "preservation": _figure(rows, "other", faithful),
        "attribute drift": _figure(rows, "other", shared),
        "leakage, other trigger": _figure(rows, "other trigger", hit),
        "attribute drift, other trigger": _figure(rows, "other trigger", shared),
        "leakage, long word": _figure(rows, "long trigger", hit),
        "attribute drift, long word": _figure(rows, "long trigger", shared),
        "leakage, class word": _figure(rows, "class word", hit),
        "attribute drift, class word": _figure(rows, "class word", shared),
        "memorisation": _figure(rows, "subject", copied),
    }


def is_difference(name: str) -> bool:
    """Whether the figure of this name is a difference to the base, in points, and not a share of pictures."""
    return name.startswith(("preservation", "attribute drift"))


def _figure(rows: Sequence[Row], name: str, value: Callable[[Row], float]) -> Figure:
    own = [row for row in rows if row.set == name]
    adapted, base = (
        {(r.group, r.prompt, r.seed): value(r) for r in own if r.adapted is switch} for switch in (True, False)
    )
    if not adapted or adapted.keys() != base.keys():
        raise ValueError(f"the set {name!r} needs rows with and without the adapter for the same prompts and seeds")
    groups = [tuple(key[0].split("/")) for key in adapted]
    on, off = list(adapted.values()), [base[key] for key in adapted]
    return Figure(
        mean_interval(on, groups),
        mean_interval(off, groups),
        difference_interval(on, off, groups),
        ratio_interval(on, off, groups) if any(off) else None,
    )
