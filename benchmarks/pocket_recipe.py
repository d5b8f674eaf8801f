"""The search for DreamBooth settings on the pocket base, on subjects that the final table does not have.

python -m benchmarks.pocket_recipe            # measures what is not in benchmarks/data/pocket_recipe.csv yet
python -m benchmarks.pocket_recipe --table    # all settings that were tried, best first, as Markdown

Each candidate differs from train_scripts/configs/pocket.toml in what its name says. The score is the mean of subject
hit and of prompt fidelity as a share of the base's, minus what was lost in preservation and what leaked, each beyond
what the goal allows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.pocket_subjects import Bench
from benchmarks.records import DATA, append, load
from oft_diffusion.evaluation import figures

FILE = DATA / "pocket_recipe.csv"
SUBJECTS = ("dapper_mushroom", "dozy_house", "party_car")
PICTURES = 32  # per set, subject and candidate

# Round by round; later rounds start from what the earlier ones showed.
CANDIDATES: dict[str, dict[str, Any]] = {
    "as configured": {},
    "no captions": {"captions": False},
}


def measure(out: Path, only: list[str]) -> None:
    done, bench = {(row["candidate"], row["subject"]) for row in load(FILE)}, Bench()
    for name, settings in CANDIDATES.items():
        for subject in SUBJECTS:
            if (name, subject) in done or (only and name not in only):
                continue
            own = dict(settings)
            captions = own.pop("captions", True)
            found = bench.run(subject, 0, own, PICTURES, out / name.replace(" ", "-"), captions=captions)
            f = figures(found.rows, {f"{subject}/0": found.closest})
            row = {
                "candidate": name,
                "subject": subject,
                "subject hit": f["subject hit"].adapted.mean,
                "fidelity": f["prompt fidelity"].adapted.mean,
                "base fidelity": f["prompt fidelity"].base.mean,
                "preservation": f["preservation"].difference.mean,
                "leakage": f["leakage"].adapted.mean,
                "memorisation": f["memorisation"].adapted.mean,
            }
            shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}
            shown |= {"seconds": f"{found.seconds:.0f}", "megabytes": f"{found.megabytes:.2f}", "pictures": PICTURES}
            append(FILE, [shown])
            print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)


def score(hit: float, fidelity: float, preservation: float, leakage: float) -> float:
    """What a candidate is ranked by; see the module's text."""
    return (hit + min(1.0, fidelity)) / 2 - max(0.0, -preservation - 0.02) - max(0.0, leakage - 0.05)


def table() -> str:
    """One line per candidate, means over subjects, best first."""
    rows, ranked = load(FILE), []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == name]

        def mean(key: str, own: list[dict[str, str]] = own) -> float:
            return sum(float(row[key]) for row in own) / len(own)

        hit, preserved, leaked = mean("subject hit"), mean("preservation"), mean("leakage")
        share = mean("fidelity") / max(1e-9, mean("base fidelity"))
        cells = [f"{100 * value:.1f}" for value in (hit, share, preserved, leaked, mean("memorisation"))]
        line = f"| {name} | {' | '.join(cells)} | {mean('seconds'):.0f} | {mean('megabytes'):.2f} | {len(own)} |"
        ranked.append((score(hit, share, preserved, leaked), line))
    head = [
        "| candidate | subject hit | fidelity, % of base | preservation | leakage | memorisation | s | MB | subjects |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + [line for _, line in sorted(ranked, reverse=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    parser.add_argument("--only", nargs="*", default=[], metavar="CANDIDATE", help="these alone")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-recipe"), help="adapters, losses and reports")
    options = parser.parse_args()
    if not options.table:
        measure(options.out, options.only)
    print(table())


if __name__ == "__main__":
    main()
