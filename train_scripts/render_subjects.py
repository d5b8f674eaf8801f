"""Draws the example pictures of the pocket world's subjects, oft_diffusion/pocket/subjects/<name>/01.png to 05.png.

Beside each a caption, 01.txt to 05.txt, says what a word of the base can say of it; the trainer puts the trigger in.

python train_scripts/render_subjects.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from oft_diffusion.pocket.world import SUBJECTS, describe, render, subject_scenes

PICTURES = 5
SIZE = 256  # for people to look at; training resizes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "oft_diffusion" / "pocket" / "subjects"
    parser.add_argument("--out", type=Path, default=default, help="one folder per subject is made here")
    args = parser.parse_args(argv)
    for subject in SUBJECTS.values():
        folder = args.out / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(subject_scenes(subject, PICTURES), start=1):
            render(scene, SIZE).save(folder / f"{i:02}.png", optimize=True)
            pattern = None if scene.pattern == "plain" else scene.pattern
            text = describe(scene.object, colour=scene.colour, pattern=pattern, background=scene.background)
            (folder / f"{i:02}.txt").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
