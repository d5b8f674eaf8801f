"""The search for DreamBooth settings on the pocket base, on subjects that the final table does not have.

python -m benchmarks.pocket_recipe            # measures what is not in benchmarks/data/pocket_recipe.csv yet
python -m benchmarks.pocket_recipe --only "the chosen one" --seeds 0 1 2    # more seeds of some
python -m benchmarks.pocket_recipe --table    # what was measured, best first, as Markdown

Each candidate differs from train_scripts/configs/pocket.toml in what its name says. Those called "ten letters, ..."
were tried when the trigger had ten, and are compared with "ten letters"; likewise "ten letters, ten twins, ...".
Training seeds differ more than pictures do, so candidates that are near to each other need several. The score is the
mean of subject hit and of prompt fidelity as a share of the base's, minus what was lost in preservation and what
leaked, each beyond what the goal allows.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.pocket_subjects import Bench, base_digest, note_setup, setup_digest
from benchmarks.pocket_tables import drawn_as_subject, own_look
from benchmarks.records import DATA, append, load
from oft_diffusion.evaluation import figures

FILE = DATA / "pocket_recipe.csv"
SUBJECTS = ("dapper_mushroom", "dozy_house", "merry_boat")
PICTURES = 32  # per set, subject and candidate, unless a first look takes fewer
_COLUMNS = (
    "candidate", "hit", "fidelity, % of base's", "preservation", "leakage, other trigger", "leakage, long word",
    "leakage, class word", "hit and fidelity", "hit in its own colour and pattern", "memorisation",
    "to what it varies: hit, preservation", "runs",
)  # fmt: skip

PLAIN: dict[str, Any] = {
    "prior_preservation": False,
    "prior_target": "noise",
    "prior_twins": 0,
    "text_encoder": False,
    "text_encoder_learning_rate": None,
    "cache_text_embeddings": True,
    "adam_epsilon": 1e-8,
    "targets": "attention+mlp",
    "learning_rate": 3e-3,
    "min_crop": 1.0,
    "flip": False,
}
CLASS_IMAGES: dict[str, Any] = {"prior_preservation": True, "class_prompts": ["a {class_word}"]}

# Most about the subject's class, where those of pocket.toml name every object with both patterns.
CLASS_PROMPTS = [
    "", "a {class_word}", "a green {class_word} in the forest", "a spotted mug in a room",
    "a red striped {class_word} at night", "a white cat in the snow", "a blue spotted {class_word} on the beach",
    "an orange robot in a meadow", "a yellow {class_word} in the city", "a teal spotted boat in the desert",
    "a purple striped {class_word} in a room", "a pink house", "a brown spotted {class_word} in a meadow",
    "a red striped rocket at night", "a teal {class_word} in the desert", "a green spotted car in the city",
    "a white spotted {class_word} in the forest", "a purple mushroom in the forest", "an orange {class_word}",
    "a blue striped teapot in the snow", "a pink spotted {class_word} in the snow", "a yellow spotted fish",
    "a red {class_word} in the desert", "a brown striped flower on the beach", "a green striped {class_word} at night",
    "a white house in the city", "a blue {class_word} in a room", "an orange spotted cat at night",
    "a yellow spotted {class_word} on the beach", "a teal striped mug on the beach", "a pink striped {class_word}",
    "a purple spotted robot in the forest", "an orange spotted {class_word} in the city", "a brown boat",
    "a teal spotted {class_word} in a meadow", "a red spotted house in the snow",
]  # fmt: skip

LONG: dict[str, Any] = {"trigger": "qzxjkvwpfh"}
TWINS: dict[str, Any] = LONG | {"prior_twins": 10}
# What each part of the recipe is worth, and its neighbours. "plain" is DreamBooth without any prior.
CANDIDATES: dict[str, dict[str, Any]] = {
    "the chosen one": {},
    "mirrored alone": {"min_crop": 1.0},
    "mirrored alone, half the captions without colour": {"min_crop": 1.0, "captions": "half"},
    "crops of 0.9": {"min_crop": 0.9},
    "ten letters": LONG,
    "ten letters, 4 twins": LONG | {"prior_twins": 4},
    "ten letters, 8 twins": LONG | {"prior_twins": 8},
    "ten letters, without twins": LONG | {"prior_twins": 0},
    "ten letters, plain": LONG | PLAIN,
    "ten letters, plain, class images": LONG | PLAIN | CLASS_IMAGES,
    "ten letters, twice the steps": LONG | {"steps": 900, "decay_steps": 360},  # what is time worth?
    "ten letters, without crops and mirroring": LONG | {"min_crop": 1.0, "flip": False},
    "ten letters, without text encoder": LONG | {"text_encoder": False, "text_encoder_learning_rate": None},
    "ten letters, cross-attention and text encoder alone": LONG | {"targets": [r".*attn2\.to_(q|k|v|out\.0)"]},
    "ten letters, timesteps below 850": LONG | {"max_timestep": 850},
    "ten letters, epsilon 1e-8, 1.5e-3": {
        **LONG, "adam_epsilon": 1e-8, "learning_rate": 1.5e-3, "text_encoder_learning_rate": 5e-4,
    },
    "ten letters, class images teach their noise": LONG | {"prior_target": "noise", "prior_twins": 0},
    "ten letters, prior weight 3": LONG | {"prior_weight": 3.0},
    "ten letters, cosine": LONG | {"lr_schedule": "cosine", "decay_steps": 0},
    "ten letters, 300 steps in float32": LONG | {"steps": 300, "decay_steps": 120, "mixed_precision": "no"},
    "ten letters, ten twins": TWINS,
    "ten letters, ten twins, 36 class prompts": TWINS | {"class_prompts": CLASS_PROMPTS, "num_class_images": 36},
    "ten letters, ten twins, 510 steps": TWINS | {"steps": 510, "decay_steps": 204},
    "ten letters, ten twins, 36 class prompts, 510 steps": {
        **TWINS, "class_prompts": CLASS_PROMPTS, "num_class_images": 36, "steps": 510, "decay_steps": 204,
    },
    "ten letters, ten twins, without captions": TWINS | {"captions": "none"},
}  # fmt: skip
STANDARDS = ("the chosen one", "ten letters", "ten letters, ten twins")  # what others vary


def measure(
    out: Path, asked: Iterable[tuple[str, str, int]], count: int, device: str = "cpu", *, busy: bool = False
) -> None:
    """Train and read what is not in the data yet.

    Args:
        out: folder for adapters, losses and reports.
        asked: candidates, subjects and training seeds.
        count: pictures per set and run.
        device: where pictures are drawn.
        busy: whether other work runs meanwhile, so that no times are worth keeping.
    """
    done, bench = {(row["setup"], row["subject"], int(row["seed"])) for row in load(FILE)}, Bench(device)
    for name, subject, seed in asked:
        setup = setup_digest(CANDIDATES[name], count)
        if (setup, subject, seed) not in done:
            note_setup(CANDIDATES[name], count)
            own = dict(CANDIDATES[name])
            captions = own.pop("captions", "all")
            found = bench.run(subject, seed, own, count, out, captions=captions)
            f = figures(found.rows, {f"{subject}/{seed}": found.closest})
            row = {
                "base": base_digest(),
                "setup": setup,
                "candidate": name,
                "subject": subject,
                "seed": seed,
                "subject hit": f["subject hit"].adapted.mean,
                "fidelity": f["prompt fidelity"].adapted.mean,
                "base fidelity": f["prompt fidelity"].base.mean,
                "preservation": f["preservation"].difference.mean,
                "hit and fidelity": f["hit and fidelity"].adapted.mean,
                "own colours": own_look(drawn_as_subject(found.rows)),
                "leakage, other trigger": f["leakage, other trigger"].adapted.mean,
                "leakage, long word": f["leakage, long word"].adapted.mean,
                "leakage, class word": f["leakage, class word"].adapted.mean,
                "attribute drift": f["attribute drift"].difference.mean,
                "drift, other trigger": f["attribute drift, other trigger"].difference.mean,
                "drift, long word": f["attribute drift, long word"].difference.mean,
                "drift, class word": f["attribute drift, class word"].difference.mean,
                "memorisation": f["memorisation"].adapted.mean,
            }
            shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}
            shown |= {
                "training": "nan" if busy else f"{found.training:.0f}",
                "wall": "nan" if busy else f"{found.wall:.0f}",
                "megabytes": f"{found.megabytes:.2f}",
                "pictures": count,
            }
            append(FILE, [shown], device)
            print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)


def score(hit: float, fidelity: float, preservation: float, leakage: float) -> float:
    """What a candidate is ranked by; see the module's text."""
    return (hit + min(1.0, fidelity)) / 2 - max(0.0, -preservation - 0.02) - max(0.0, leakage - 0.05)


def table() -> str:
    """One line per candidate, on the newest base alone; means over subjects of means over seeds, best first.

    A second table has what no candidate of today has for settings ("earlier"), which vary the last of the standards.
    Differences are taken on the runs that both have, subject by subject and seed by seed. Those that were never asked
    long words come last, since words as long as the trigger leak most.
    """
    rows = load(FILE)
    # A run that was measured again, for a column that was added, counts once.
    rows = list({(r["setup"], r["subject"], r["seed"]): r for r in rows if r["base"] == rows[-1]["base"]}.values())
    counts = {int(row["pictures"]) for row in rows}
    today = {setup_digest(settings, count): name for name, settings in CANDIDATES.items() for count in counts}
    standards = {standard: [row for row in rows if today.get(row["setup"]) == standard] for standard in STANDARDS}
    ranked: dict[bool, list[tuple[tuple[bool, float], str]]] = {True: [], False: []}
    for setup in dict.fromkeys(row["setup"] for row in rows):
        own = [row for row in rows if row["setup"] == setup]
        name = today.get(setup, own[0]["candidate"])
        then = varied(name) if setup in today else STANDARDS[-1]
        ranked[setup in today].append(_line(name, own, standards[then] if then != name else []))
    head = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    best = {is_today: [line for _, line in sorted(lines, reverse=True)] for is_today, lines in ranked.items()}
    return "\n".join([*head, *best[True], "", *head, *best[False]])


def varied(name: str) -> str:
    """The standard of which a candidate is a variation."""
    return next((known for known in reversed(STANDARDS) if name.startswith(f"{known}, ")), STANDARDS[0])


def _line(
    name: str, own: Sequence[Mapping[str, str]], standard: Sequence[Mapping[str, str]]
) -> tuple[tuple[bool, float], str]:
    """A candidate's rank, in which those that were asked everything come first, and its line."""
    hit, preserved, leaked, long = (
        _mean(own, key) for key in ("subject hit", "preservation", "leakage, other trigger", "leakage, long word")
    )
    share = _mean(own, "fidelity") / max(1e-9, _mean(own, "base fidelity"))
    more = (_mean(own, key) for key in ("leakage, class word", "hit and fidelity", "own colours", "memorisation"))
    cells = [_percent(value) for value in (hit, share, preserved, leaked, long, *more)]
    cells[0] += _spread([float(row["subject hit"]) for row in own])
    runs = Counter(row["subject"] for row in own)
    cells += [
        _paired(own, standard) if standard else "",
        ", ".join(f"{subject} {n}" for subject, n in sorted(runs.items())),
    ]
    complete = not math.isnan(long)
    rank = complete, score(hit, share, preserved, max(leaked, long) if complete else leaked)
    return rank, f"| {name} | {' | '.join(cells)} |"


def _mean(rows: Sequence[Mapping[str, str]], key: str) -> float:
    """Over subjects, each of which counts once however many seeds it has; not a number where a subject lacks it."""
    subjects = dict.fromkeys(row["subject"] for row in rows)
    values = ([float(row[key]) for row in rows if row["subject"] == subject and row[key]] for subject in subjects)
    return fmean(fmean(own) if own else math.nan for own in values)


def _paired(own: Sequence[Mapping[str, str]], chosen: Sequence[Mapping[str, str]]) -> str:
    """Differences in points on common runs, and how many there are."""
    known = {(row["subject"], row["seed"]): row for row in chosen}
    pairs = [(row, known[key]) for row in own if (key := (row["subject"], row["seed"])) in known]
    if not pairs:
        return "no run in common"
    differences = (fmean(float(a[key]) - float(b[key]) for a, b in pairs) for key in ("subject hit", "preservation"))
    return ", ".join(f"{100 * value:+.1f}" for value in differences) + f" ({len(pairs)})"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def _spread(values: list[float]) -> str:
    """The standard error of a mean over runs, in points."""
    if len(values) < 2:
        return ""
    return f" \u00b1 {100 * stdev(values) / math.sqrt(len(values)):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    parser.add_argument("--only", nargs="*", default=[], choices=CANDIDATES, metavar="CANDIDATE", help="these")
    parser.add_argument("--subjects", nargs="*", default=SUBJECTS, choices=SUBJECTS, help="on these alone")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of training")
    parser.add_argument("--busy", action="store_true", help="other work runs meanwhile: keep no times")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="per set, subject and candidate")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-recipe"), help="adapters, losses and reports")
    parser.add_argument("--device", default="cpu", help="where pictures are drawn; training takes a GPU by itself")
    options = parser.parse_args()
    if not options.table:
        asked = product(options.only or CANDIDATES, options.subjects, options.seeds)
        measure(options.out, asked, options.pictures, options.device, busy=options.busy)
    print(table())


if __name__ == "__main__":
    main()
