"""What a subject of the pocket world looks like, read from its instance images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation.reading import pixels, read
from oft_diffusion.images import image_files, read_picture
from oft_diffusion.pocket.classifier import AttributeClassifier
from oft_diffusion.pocket.world import UNCAPTIONED


@dataclass(frozen=True)
class Looks:
    """A subject as its instance images show it.

    Attributes:
        object: what it is.
        uncaptioned: its fixed accent, face, hat and badge.
        colour: its body's colour in the images.
        backgrounds: where the images show it.
        images: the instance images, float32 `(n, 128, 128, 3)` from 0 to 1.
    """

    object: str
    uncaptioned: dict[str, str]
    colour: str
    backgrounds: tuple[str, ...]
    images: np.ndarray

    def nearest(self, picture: Image.Image) -> float:
        """Root mean square distance of a picture to the nearest instance image, mirrored or not."""
        own = pixels(picture)
        return min(_distance(image, seen) for image in self.images for seen in (own, own[:, ::-1]))

    def closest(self) -> float:
        """The same between the two instance images that are most alike."""
        return min(_distance(a, b) for one, a in combinations(self.images, 2) for b in (one, one[:, ::-1]))


def looks_of(classifier: AttributeClassifier, images: Sequence[Image.Image]) -> Looks:
    """What a subject's instance images have in common, read by the classifier; the majority decides.

    Raises:
        ConfigError: fewer than two images, or they agree on no one subject.
    """
    readings = read(classifier, images) if len(images) >= 2 else []
    shared = ("object", "colour", *UNCAPTIONED) if readings else ()
    common = {name: Counter(r[name] for r in readings).most_common(1)[0] for name in shared}
    unclear = [name for name, (_, count) in common.items() if count <= len(readings) / 2]
    if not readings or unclear:
        raise ConfigError(
            f"{len(images)} instance image(s) do not show one subject of the pocket world"
            + (f": they disagree on {', '.join(unclear)}" if unclear else ""),
            expected="two or more drawings of one subject, such as those in oft_diffusion/pocket/subjects/",
            fix="evaluate adapters that were trained on such images",
        )
    return Looks(
        object=common["object"][0],
        uncaptioned={name: common[name][0] for name in UNCAPTIONED},
        colour=common["colour"][0],
        backgrounds=tuple(sorted({r["background"] for r in readings})),
        images=np.stack([pixels(image) for image in images]),
    )


def instance_images(folder: Path, name: str = "instance_dir") -> list[Image.Image]:
    """The images in a folder, as training reads them. Errors call the folder by `name`.

    Raises:
        DataError: there is no such folder, or an image in it cannot be read.
    """
    return [read_picture(path) for path in image_files(folder, name)]


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).mean()))
