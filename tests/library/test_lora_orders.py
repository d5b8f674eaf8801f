"""A LoRA that diffusers loads beside an OFT adapter: every order of loading, fusing and unloading, as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from oft_diffusion import fuse_oft, load_oft_weights, unfuse_oft, unload_oft_weights
from oft_diffusion.errors import AdapterError
from tests.library.support import BOTH, assert_one_sentence, copy_pipe, distance, draw

MOVED = 1e-3
ROUNDING = 2e-5  # of fused weights

# Steps as in `STEPS`; `=` and the picture that the pipeline draws then; `!` after a step that is refused and changes
# nothing. "both" is W R^T + B A, whatever came first.
TABLE = [
    # nothing is fused
    "oft lora =both unload_lora =oft unload_oft =base",
    "oft lora =both unload_oft =lora unload_lora =base",
    "lora oft =both unload_lora =oft unload_oft =base",
    "lora oft =both unload_oft =lora unload_lora =base",
    # OFT is
    "oft lora fuse_oft =both unload_oft! unload_lora =oft unfuse_oft =oft unload_oft =base",
    "oft lora fuse_oft =both unfuse_oft =both unload_oft =lora unload_lora =base",
    "lora oft fuse_oft =both unload_oft! unload_lora =oft unfuse_oft =oft unload_oft =base",
    "lora oft fuse_oft =both unfuse_oft =both unload_lora =oft unload_oft =base",
    "oft fuse_oft lora =both unload_oft! unload_lora =oft unfuse_oft =oft unload_oft =base",
    "oft fuse_oft lora =both unfuse_oft =both unload_oft =lora unload_lora =base",
    # both are
    "oft lora fuse_oft fuse_lora =both unload_oft! unfuse_oft! unfuse_lora =both unfuse_oft =both unload_lora =oft",
    "lora oft fuse_oft fuse_lora =both unload_oft! unfuse_oft! unfuse_lora =both unload_lora =oft unfuse_oft =oft",
    "oft fuse_oft lora fuse_lora =both unfuse_oft! unfuse_lora unfuse_oft =both unload_oft =lora unload_lora =base",
    # the LoRA is, and what is left of it when it is unloaded is a base: what would lose or rotate it is refused
    "oft lora fuse_oft fuse_lora unload_lora =both unfuse_oft! unload_oft! =both",
    "lora oft fuse_oft fuse_lora unload_lora =both unfuse_oft! unload_oft! =both",
    "oft lora fuse_lora draw! fuse_oft! bake_oft! unload_oft =lora unfuse_lora =lora unload_lora =base",
    "oft lora fuse_lora unload_oft =lora unload_lora =lora",
    "lora fuse_lora oft draw! unload_oft =lora unfuse_lora =lora unload_lora =base",
    "lora fuse_lora oft draw! unfuse_lora =both unload_lora =oft unload_oft =base",
    # OFT is, for good (`keep_base=False`)
    "oft lora bake_oft =both unfuse_oft! unload_oft =both unload_lora =oft",
    "lora oft bake_oft =both unload_lora =oft unfuse_oft! unload_oft =oft",
    "oft bake_oft unload_oft lora =both unload_lora =oft",
    "oft lora bake_oft fuse_lora =both unload_oft =both unfuse_lora =both unload_lora =oft",
    "lora oft bake_oft fuse_lora =both unload_oft unload_lora =both",
]


@pytest.fixture(scope="module")
def files(base_pipe: Any, mug: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An OFT adapter's file, and a folder with a LoRA for the same components."""
    donor, folder = copy_pipe(base_pipe), tmp_path_factory.mktemp("lora")
    torch.manual_seed(7)
    layers = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "out_proj"]}
    for part in BOTH:
        config = LoraConfig(r=4, lora_alpha=4, target_modules=layers[part], init_lora_weights=False)
        getattr(donor, part).add_adapter(config)
    states = {f"{part}_lora_layers": get_peft_model_state_dict(getattr(donor, part)) for part in BOTH}
    donor.save_lora_weights(folder, **states)
    return mug, folder


STEPS: dict[str, Callable[[Any, Path, Path], object]] = {
    "oft": lambda pipe, oft, _: load_oft_weights(pipe, oft, adapter_name="mug"),
    "lora": lambda pipe, _, lora: pipe.load_lora_weights(lora, adapter_name="style"),
    "fuse_oft": lambda pipe, *_: fuse_oft(pipe),
    "bake_oft": lambda pipe, *_: fuse_oft(pipe, keep_base=False),
    "unfuse_oft": lambda pipe, *_: unfuse_oft(pipe),
    "unload_oft": lambda pipe, *_: unload_oft_weights(pipe),
    "fuse_lora": lambda pipe, *_: pipe.fuse_lora(components=list(BOTH)),
    "unfuse_lora": lambda pipe, *_: pipe.unfuse_lora(components=list(BOTH)),
    "unload_lora": lambda pipe, *_: pipe.unload_lora_weights(),
    "draw": lambda pipe, *_: draw(pipe),
}


@pytest.fixture(scope="module")
def pictures(base_pipe: Any, files: tuple[Path, Path]) -> dict[str, Tensor]:
    found = {}
    for name, steps in {"base": [], "oft": ["oft"], "lora": ["lora"], "both": ["lora", "oft"]}.items():
        pipe = copy_pipe(base_pipe)
        for step in steps:
            STEPS[step](pipe, *files)
        found[name] = draw(pipe)
    shown = list(found.values())
    assert all(distance(a, b) > MOVED for i, a in enumerate(shown) for b in shown[:i])
    return found


def weights(pipe: Any) -> dict[str, Tensor]:
    """The base's, whatever they are wrapped in."""
    named = ((f"{part}.{name}", t) for part in BOTH for name, t in getattr(pipe, part).state_dict().items())
    return {name.replace(".base_layer", ""): t.clone() for name, t in named if ".lora_" not in name}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def trainable(pipe: Any) -> set[str]:
    return {f"{part}.{name}" for part in BOTH for name, p in getattr(pipe, part).named_parameters() if p.requires_grad}


@pytest.mark.thinned(5)
@pytest.mark.filterwarnings("ignore:.*was trained on another base")  # one with a LoRA fused into it is
@pytest.mark.parametrize("row", TABLE)
def test_the_table(pipe: Any, files: tuple[Path, Path], pictures: dict[str, Tensor], row: str) -> None:
    before = weights(pipe)
    exact = "fuse_lora" not in row  # which PEFT takes out again by subtracting
    live = True
    for step in row.split():
        if step.startswith("="):
            picture = draw(pipe)
            assert distance(picture, pictures[step[1:]]) < ROUNDING, step
            assert not (exact and live) or torch.equal(picture, pictures[step[1:]]), step
        elif step.endswith("!"):
            held = weights(pipe)
            with pytest.raises(AdapterError) as error:
                STEPS[step[:-1]](pipe, *files)
            assert_one_sentence(error)
            assert same(weights(pipe), held)
        else:
            STEPS[step](pipe, *files)
            live = live if step not in ("fuse_oft", "bake_oft", "unfuse_oft") else step == "unfuse_oft"
    if exact and "bake_oft" not in row:
        assert same(weights(pipe), before)


@pytest.mark.parametrize(
    "row", ["oft lora unload_oft", "oft fuse_oft lora unfuse_oft unload_oft", "lora oft unload_oft"]
)
def test_a_lora_is_as_trainable_as_without_oft(pipe: Any, base_pipe: Any, files: tuple[Path, Path], row: str) -> None:
    alone = copy_pipe(base_pipe)
    alone.load_lora_weights(files[1], adapter_name="style")
    for step in row.split():
        STEPS[step](pipe, *files)
    assert trainable(pipe) == trainable(alone)
    for each in (pipe, alone):
        each.unload_lora_weights()
    assert trainable(pipe) == trainable(alone)


def test_a_lora_that_unfusing_would_lose_is_named(pipe: Any, files: tuple[Path, Path]) -> None:
    for step in ("oft", "lora", "fuse_oft", "fuse_lora", "unload_lora"):
        STEPS[step](pipe, *files)
    with pytest.raises(AdapterError) as error:
        unfuse_oft(pipe)
    assert_one_sentence(error, "is not what merging mug made of it", "a LoRA", "unfuse_lora before unload_lora_weights")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_change(pipe: Any, files: tuple[Path, Path], dtype: torch.dtype) -> None:
    """What PEFT leaves when it takes a LoRA out again, and what a cast leaves, keeps nobody from unfusing."""
    for part in BOTH:
        getattr(pipe, part).to(dtype)
    base = weights(pipe)
    for step in ("oft", "lora", "fuse_oft", "fuse_lora", "unfuse_lora", "unfuse_oft"):
        STEPS[step](pipe, *files)
    assert same(weights(pipe), base)
    pipe.unload_lora_weights()
    fuse_oft(pipe)
    for part in BOTH:
        getattr(pipe, part).to(torch.bfloat16).to(dtype)
    unfuse_oft(pipe)
    adapted = [name for name in base if name.endswith("to_q.weight")]  # the others stay rounded
    assert adapted
    assert all(torch.equal(weights(pipe)[name], base[name]) for name in adapted)


def test_other_weights_that_were_loaded_since_are_not_undone(pipe: Any, files: tuple[Path, Path]) -> None:
    load_oft_weights(pipe, files[0], adapter_name="mug")
    fuse_oft(pipe)
    other = {name: torch.randn_like(t) * t.std() for name, t in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict(other)
    with pytest.raises(AdapterError, match="or other weights were loaded"):
        unfuse_oft(pipe)
    assert same(dict(pipe.unet.state_dict()), other)
