"""Mixed batches: another adapter for each image of one batch, in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from oft_diffusion.deltas import DeltaBuilder, Placement
from oft_diffusion.errors import AdapterError
from oft_diffusion.plan import Active, Adapter, Member, Part, Stage, rows_in, split_by_site


@dataclass(frozen=True)
class Mixture:
    """The adapter of each image of a pipeline call, in diffusers' order of rows: prompt by prompt.

    Attributes:
        images: one per image; None is the base.
        per_prompt: whether the component sees one row per prompt, as text encoders do, not one per image.
    """

    images: tuple[Active | None, ...]
    per_prompt: bool = False

    @property
    def adapters(self) -> tuple[Active, ...]:
        """Each adapter, or adapter at a strength, once."""
        return tuple(dict.fromkeys(item for item in self.images if item is not None))

    def rows(self, batch: int, component: str, prompts: int | None) -> list[Active | None]:
        """The adapter of each row of a component's batch.

        A denoiser's batch is the images, once or, for guidance, several times over. A text encoder's is the prompts,
        each of which may have several images, once or, with negative ones in the same call, several times over.

        Args:
            batch: how many rows it has.
            component: for messages.
            prompts: of the pipeline call that is running; None outside one.

        Raises:
            AdapterError: the batch is neither, or could be several things, or images of one prompt want its text in
                several ways.
        """
        images = len(self.images)
        if self.per_prompt and len(set(self.images)) == 1:
            return [self.images[0]] * batch  # whatever is read
        if prompts is None:
            raise AdapterError(
                f"{component} is called while {images} images have adapters of their own, but not by the pipeline of "
                "this block, so that nothing tells which rows are which images",
                expected="calls of the pipeline that was given to oft_adapters_per_image, with prompts and all",
                fix="give it the pipeline that draws, not another one with the same components, and call that",
            )
        if self.per_prompt:
            return self._texts(batch, component, prompts)
        if batch % images:
            raise AdapterError(
                f"{component} is called with {batch} rows while {images} images have adapters of their own",
                expected=f"a multiple of {images} rows: one name per image, prompts x images per prompt",
                fix="give as many adapter names as the pipeline call makes images",
            )
        return list(self.images) * (batch // images)

    def _texts(self, batch: int, component: str, prompts: int) -> list[Active | None]:
        each = len(self.images) // prompts
        apart = [self.images[i : i + each] for i in range(0, len(self.images), each)]
        if any(len(set(prompt)) > 1 for prompt in apart):
            raise AdapterError(
                f"{each} images with different adapters, of which some adapt {component}, have one text that it reads "
                "once",
                expected="one adapter for all images of a prompt, where it adapts a text encoder",
                fix="give prompts, and negative prompts, once per image, with num_images_per_prompt=1",
            )
        if batch % prompts:
            raise AdapterError(
                f"{component} reads {batch} texts at once while the call has {prompts} prompts, and nothing tells "
                "whose they are",
                expected=f"a multiple of {prompts} texts, where different adapters adapt a text encoder",
                fix="draw prompt by prompt, or with adapters that leave text encoders alone",
            )
        rows = [prompt[0] for prompt in apart] * (batch // prompts)
        if batch % len(self.images) == 0 and rows != list(self.images) * (batch // len(self.images)):
            raise AdapterError(
                f"{component} reads {batch} texts at once for {prompts} prompts with {each} images each, and nothing "
                "tells whether these are prompts and negative prompts, or one text per image",
                expected="as many texts as prompts, or one image per prompt",
                fix="give prompts, and negative prompts, once per image, with num_images_per_prompt=1",
            )
        return rows


class MixedDeltas:
    """A mixture's deltas: each adapter's built once, then gathered row by row for the batch of a forward."""

    def __init__(self, mixture: Mixture, builder: DeltaBuilder, adapters: Mapping[str, Adapter]) -> None:
        self._mixture = mixture
        self._builder = builder
        self.images = len(mixture.images)
        self.prompts: int | None = None  # of the pipeline call that is running
        self.stages = _stages(mixture.adapters, adapters)
        self._apart: dict[Placement, list[Tensor]] = {}
        self._last: tuple[object, dict[str, tuple[Tensor, ...]]] = ((), {})

    def check(self, placement: Placement) -> None:
        """Build every delta, for the errors that this may raise.

        Raises:
            AdapterError: a strength is not possible for a series adapter.
        """
        self._build(placement)

    def at(self, batch: int, placement: Placement, component: str) -> dict[str, tuple[Tensor, ...]]:
        """Per site, deltas `(rows, r, b, b)` for a batch of that many rows.

        Raises:
            AdapterError: see `Mixture.rows`.
        """
        key = (batch, placement, self.prompts)
        if self._last[0] != key:
            rows = self._mixture.rows(batch, component, self.prompts)
            apart = zip(self.stages, self._build(placement), strict=True)
            flats = [flat.index_select(0, _places(stage, rows).to(placement[0])) for stage, flat in apart]
            self._last = key, split_by_site(self.stages, flats)
        return self._last[1]

    def _build(self, placement: Placement) -> list[Tensor]:
        if placement not in self._apart:
            with torch.inference_mode(False), torch.no_grad():
                flats = self._builder.build_apart(self.stages, placement[0])
                self._apart[placement] = [flat.to(placement[1]) for flat in flats]
            self._builder.forget_deltas()
        return self._apart[placement]


def _stages(items: tuple[Active, ...], adapters: Mapping[str, Adapter]) -> tuple[Stage, ...]:
    """One stage per block size. Its members stand side by side: no image meets two of them."""
    sizes: dict[int, list[tuple[Active, Part]]] = {}
    for item in items:
        for part in adapters[item.name].parts:
            sizes.setdefault(part.block_size, []).append((item, part))
    stages = []
    for size, members in sizes.items():
        blocks = {site: count for _, part in members for site, count in part.blocks.items()}
        found = tuple(Member(item, part, rows_in(part, blocks)) for item, part in members)
        stages.append(Stage(size, blocks, {site: site for site in blocks}, found))
    return tuple(stages)


def _places(stage: Stage, rows: list[Active | None]) -> Tensor:
    """Where each row's adapter is among a stage's members, 0 being the identity before them."""
    places = {member.active: place for place, member in enumerate(stage.members, start=1)}
    return torch.tensor([0 if item is None else places.get(item, 0) for item in rows])
