"""Runs diffusers' own DreamBooth scripts on tiny pipelines, and keeps what they drew and the losses they computed.

    git clone https://github.com/huggingface/diffusers CLONE
    python -m tests.helpers.record_dreambooth CLONE --tag v0.40.0

writes tests/data/dreambooth.json and dreambooth.safetensors, with which `tests/families/test_diffusers_scripts.py`
compares our losses. The scripts run as they are at the tag. They are given pictures of just the training resolution,
and in place of torchvision, of which they use a few transforms, the stand-in below, which can do no more than that.
Nothing is learned (a rate of 0), so every step's loss is the base's.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import diffusers
import diffusers.models.autoencoders.vae as vae_module
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.tiny_families import side_of, write_tiny_family
from tests.helpers.tiny_sd import draw_pictures

DATA = Path(__file__).parents[1] / "data"
RECORD, TENSORS = DATA / "dreambooth.json", DATA / "dreambooth.safetensors"
SCRIPTS = {
    "StableDiffusionPipeline": "train_dreambooth_lora.py",
    "StableDiffusionXLPipeline": "train_dreambooth_lora_sdxl.py",
    "StableDiffusion3Pipeline": "train_dreambooth_lora_sd3.py",
    "FluxPipeline": "train_dreambooth_lora_flux.py",
    "QwenImagePipeline": "train_dreambooth_lora_qwen_image.py",
    "Krea2Pipeline": "train_dreambooth_lora_krea2.py",
    "ZImagePipeline": "train_dreambooth_lora_z_image.py",
    "Lumina2Pipeline": "train_dreambooth_lora_lumina2.py",
    "SanaPipeline": "train_dreambooth_lora_sana.py",
}
# So that prompts are as long, and guidance is told, as in our training. By default SD 3's script compares pictures, not
# velocities, which weights the loss by the square of the noise level.
MORE = {
    "StableDiffusion3Pipeline": ["--max_sequence_length", "256", "--precondition_outputs", "0"],
    "FluxPipeline": ["--guidance_scale", "1"],
}
# Their scripts fail where class images are asked for.
WITHOUT_PRIOR = ("ZImagePipeline", "Lumina2Pipeline")
STEPS, SEED, PRIOR_WEIGHT = 4, 7, 0.5
PROMPT, CLASS_PROMPT = "a sks mug", "a mug"
_PRIOR = ["--with_prior_preservation", "--prior_loss_weight", str(PRIOR_WEIGHT), "--num_class_images", "3"]


class _EnoughError(Exception):
    """All steps are recorded."""


class Recorder:
    """What a script draws and computes in each step, taken where it calls torch, diffusers and accelerate."""

    def __init__(self, model: Path) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.seen: dict[str, Tensor] = {}
        parts = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
        self._denoiser = getattr(diffusers, (parts.get("transformer") or parts["unet"])[1])
        self._vae = getattr(diffusers, parts["vae"][1])

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Patches in place."""
        places: list[tuple[Any, str, Callable[[Any], Any]]] = [
            (self._vae, "encode", self._encode),
            (vae_module, "randn_tensor", lambda call: self._drawn("posterior_noise", call)),
            (torch, "randn_like", lambda call: self._drawn("noise", call)),
            (self._denoiser, "forward", self._forward),
            (accelerate.Accelerator, "backward", lambda call: self._backward),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        for (owner, name, wrap), (_, _, call) in zip(places, before, strict=True):
            setattr(owner, name, wrap(call))
        try:
            yield
        finally:
            for owner, name, call in before:
                setattr(owner, name, call)

    def _drawn(self, name: str, call: Any) -> Any:
        def draw(*args: Any, **kwargs: Any) -> Tensor:
            self.seen[name] = call(*args, **kwargs)
            return self.seen[name]

        return draw

    def _encode(self, call: Any) -> Any:
        def encode(vae: Any, pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
            bytes_ = ((pixels + 1) * 127.5).round()
            assert torch.allclose(bytes_ / 127.5 - 1, pixels, atol=1e-6)
            self.seen["pixels"] = bytes_.to(torch.uint8)
            return call(vae, pixels, *args, **kwargs)

        return encode

    def _forward(self, call: Any) -> Any:
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen["timestep"] = kwargs["timestep"] if "timestep" in kwargs else args[1]
            return call(model, *args, **kwargs)

        return forward

    def _backward(self, loss: Tensor, **_: Any) -> None:
        self.steps.append(
            {name: value.detach().clone().contiguous() for name, value in {**self.seen, "loss": loss}.items()}
        )
        if len(self.steps) == STEPS:
            raise _EnoughError


def arguments(model: Path, instances: Path, classes: Path, output: Path, name: str) -> list[str]:
    """A script's command line."""
    return [
        "--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(instances), "--class_data_dir",
        str(classes), "--output_dir", str(output), "--instance_prompt", PROMPT, "--class_prompt", CLASS_PROMPT,
        "--resolution", str(side_of(name)), "--train_batch_size", "1", "--max_train_steps", str(2 * STEPS),
        "--learning_rate", "0", "--seed", str(SEED), "--center_crop", "--mixed_precision", "no",
        *([] if name in WITHOUT_PRIOR else _PRIOR), *MORE.get(name, []),
    ]  # fmt: skip


def record(script: Path, name: str) -> dict[str, Tensor]:
    """Run one script on one tiny pipeline, and return each step's tensors as `step/what`."""
    with tempfile.TemporaryDirectory() as folder, _torchvision():
        root = Path(folder)
        side = side_of(name)
        instances, classes = (draw_pictures(root / kind, side=side) for kind in ("instances", "classes"))
        model = write_tiny_family(name, root)
        command = arguments(model, instances, classes, root / "output", name)
        module = _load(script)
        module.args = args = module.parse_args(command)
        args.report_to = None
        recorder = Recorder(model)
        with recorder.installed(), contextlib.suppress(_EnoughError):
            module.main(args)
    return {f"{i}/{what}": tensor for i, step in enumerate(recorder.steps) for what, tensor in step.items()}


def _load(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- in place of torchvision -------------------------------------------------------------------------------------------


class _InterpolationMode(enum.Enum):
    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """`torchvision.transforms` as far as the scripts need it for pictures that have the training resolution."""
    transforms: Any = types.ModuleType("torchvision.transforms")
    functional: Any = types.ModuleType("torchvision.transforms.functional")
    top: Any = types.ModuleType("torchvision")
    top.transforms, transforms.functional = transforms, functional
    transforms.InterpolationMode = _InterpolationMode
    transforms.Compose = lambda steps: lambda image: _in_turn(steps, image)
    transforms.Resize = transforms.CenterCrop = lambda size, **_: lambda image: _unchanged(image, size)
    transforms.RandomCrop = transforms.RandomHorizontalFlip = lambda *_, **__: _refused
    transforms.ToTensor = lambda: _to_tensor
    transforms.Normalize = lambda mean, std: lambda x: _normalised(x, mean, std)
    functional.crop = functional.hflip = _refused
    functional.resize = functional.center_crop = lambda image, size, **_: _unchanged(image, size)
    functional.to_tensor, functional.normalize = _to_tensor, _normalised
    names = {module.__name__: module for module in (top, transforms, functional)}
    diffusers.utils.import_utils.is_xformers_available()  # what looks for packages has looked before these appear
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _in_turn(steps: list[Any], value: Any) -> Any:
    for step in steps:
        value = step(value)
    return value


def _unchanged(image: Image.Image, size: int | Sequence[int]) -> Image.Image:
    assert image.size == ((size, size) if isinstance(size, int) else tuple(reversed(size)))
    return image


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (x - mean[0]) / std[0]


def _refused(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the stand-in for torchvision neither crops nor mirrors")


# ----------------------------------------------------------------------------------------------------------------------


def digest(model: Path) -> str:
    """SHA-256 over the weights of a tiny pipeline, which are drawn anew wherever a test runs."""
    found = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def git(clone: Path, *arguments: str) -> bytes:
    """What a git command prints."""
    return subprocess.run(["git", "-C", str(clone), *arguments], check=True, capture_output=True).stdout


def main() -> None:
    """Record every family, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of diffusers, or with --only a script")
    parser.add_argument("--tag", help="the release whose scripts are run")
    parser.add_argument("--only", nargs=2, metavar=("FAMILY", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        save_file(record(options.clone, options.only[0]), options.only[1])
        return
    commit = git(options.clone, "rev-parse", f"{options.tag}^{{commit}}").decode().strip()
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {
        "command": f"python -m tests.helpers.record_dreambooth CLONE --tag {options.tag}",
        "repository": "huggingface/diffusers", "tag": options.tag, "commit": commit,
        "diffusers": diffusers.__version__, "torch": torch.__version__.split("+")[0], "families": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, script in SCRIPTS.items():
            path, out = Path(folder) / script, Path(folder) / f"{name}.safetensors"
            path.write_bytes(git(options.clone, "show", f"{options.tag}:examples/dreambooth/{script}"))
            command = [sys.executable, "-m", "tests.helpers.record_dreambooth", str(path), "--only", name, str(out)]
            subprocess.run(command, check=True)
            found = load_file(out)
            places = [Path(place) for place in ("MODEL", "INSTANCES", "CLASSES", "OUTPUT")]
            told["families"][name] = {
                "script": f"examples/dreambooth/{script}",
                "arguments": " ".join(arguments(places[0], places[1], places[2], places[3], name)),
                "base": digest(write_tiny_family(name, Path(folder) / "again")),
                "losses": [float(found[f"{i}/loss"]) for i in range(STEPS)],
                "timesteps": [found[f"{i}/timestep"].tolist() for i in range(STEPS)],
            }
            tensors |= {f"{name}/{key}": t for key, t in found.items() if not key.endswith(("loss", "timestep"))}
            print(name, told["families"][name]["losses"], flush=True)
    RECORD.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, TENSORS)
    TENSORS.chmod(0o644)


if __name__ == "__main__":
    main()
