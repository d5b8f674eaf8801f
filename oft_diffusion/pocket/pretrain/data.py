"""The pictures that the pocket base is pretrained on: rendered once, kept as one memory-mapped array."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oft_diffusion.pocket.world import SIZE, Scene, render, sample_scene

WORTH_PROCESSES = 1000  # pictures; fewer are drawn before another process has started


def scene_at(seed: int, index: int) -> Scene:
    """The scene of one training picture."""
    return sample_scene(random.Random(f"scene/{seed}/{index}"))


def _render_part(path: Path, seed: int, indices: range) -> None:
    pictures = np.load(path, mmap_mode="r+")
    for i in indices:
        pictures[i] = np.asarray(render(scene_at(seed, i)))
    pictures.flush()


def _render_apart(path: Path, seed: int, count: int, processes: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    parts = [range(k, count, processes) for k in range(processes)]
    workers = [spawn.Process(target=_render_part, args=(path, seed, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a rendering process ended with exit code {worker.exitcode}")


def rendered(out: Path, count: int, seed: int, processes: int = 2) -> np.ndarray:
    """All training pictures, uint8 (count, 128, 128, 3), rendered by several processes on the first call."""
    path = out / f"pictures-{count}-{seed}.npy"
    if not path.exists():
        print(f"rendering {count} pictures", flush=True)
        partial = out / "pictures.partial.npy"
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3)).flush()
        if count < WORTH_PROCESSES:
            _render_part(partial, seed, range(count))
        else:
            _render_apart(partial, seed, count, processes)
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def to_model(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (n, h, w, 3) to float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_pictures(x: Tensor) -> list[Image.Image]:
    """Float (n, 3, h, w) in [-1, 1] to pictures."""
    pixels = x.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]
