"""The five figures, from rows that say what is in each picture.

- *subject hit*: the object and all uncaptioned attributes of the subject are read right in one picture, on backgrounds
  that its pictures do not have.
- *prompt fidelity*: all captioned attributes that the prompt names are read right, for the subject in colours and on
  backgrounds that its pictures do not have; compared with the base's on the same prompts and seeds.
- *preservation*: the same on prompts without the subject, minus the base's on the same prompts and seeds.
- *leakage*: subject hits where the trigger is absent or another one.
- *memorisation*: pictures of the subject that are nearer to one of its instance pictures than these are to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from oft_diffusion.evaluation.intervals import Interval, bootstrap
from oft_diffusion.evaluation.reading import Reading

SETS = ("subject", "recoloured", "other", "leakage")


@dataclass(frozen=True)
class Row:
    """One picture.

    Attributes:
        group: the run that it belongs to, such as "captain_mug/0"; intervals over several runs resample these.
        set: which of `SETS` its prompt is of.
        prompt: its text.
        seed: of its noise.
        adapted: whether the adapter was on.
        reading: what the classifier saw.
        hit: whether the subject is in it.
        faithful: whether it shows everything that the prompt names.
        nearest: root mean square distance to the nearest instance picture, pixels from 0 to 1.
    """

    group: str
    set: str
    prompt: str
    seed: int
    adapted: bool
    reading: Reading
    hit: bool
    faithful: bool
    nearest: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `Row(**row.to_json())` is the row again."""
        return asdict(self)


class Figure(NamedTuple):
    """One figure with the adapter, without it, and the paired difference; shares of pictures, from 0 to 1."""

    adapted: Interval
    base: Interval
    difference: Interval


def figures(rows: Sequence[Row], closest_instances: Mapping[str, float]) -> dict[str, Figure]:
    """All figures over the rows of one or more runs.

    Args:
        rows: for each prompt and seed one row with the adapter and one without.
        closest_instances: per group, the distance between the two instance pictures that are most alike.

    Raises:
        ValueError: a set has no rows, or a row has no partner.
    """

    def hit(row: Row) -> float:
        return float(row.hit)

    def faithful(row: Row) -> float:
        return float(row.faithful)

    def copied(row: Row) -> float:
        return float(row.nearest < closest_instances[row.group])

    return {
        "subject hit": _figure(rows, "subject", hit),
        "prompt fidelity": _figure(rows, "recoloured", faithful),
        "preservation": _figure(rows, "other", faithful),
        "leakage": _figure(rows, "leakage", hit),
        "memorisation": _figure(rows, "subject", copied),
    }


def _figure(rows: Sequence[Row], name: str, value: Callable[[Row], float]) -> Figure:
    adapted, base = (
        {(r.group, r.prompt, r.seed): value(r) for r in rows if r.set == name and r.adapted is on}
        for on in (True, False)
    )
    if not adapted or adapted.keys() != base.keys():
        raise ValueError(f"the set {name!r} needs rows with and without the adapter for the same prompts and seeds")
    groups = [key[0] for key in adapted]
    return Figure(
        bootstrap(list(adapted.values()), groups),
        bootstrap([base[key] for key in adapted], groups),
        bootstrap([adapted[key] - base[key] for key in adapted], groups),
    )
