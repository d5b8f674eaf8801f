"""Arithmetic on adapters: what does not belong together is refused, and what the result says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oft_diffusion import geodesics
from oft_diffusion.arithmetic import average, compose, interpolate, power, subtract
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError
from oft_diffusion.files import AdapterFile, load_adapter_file, save_adapter_file
from tests.core.reference import random_packed
from tests.core.test_arithmetic import KEY, adapter, dense, drawn, gap, turning
from tests.library.support import assert_one_sentence

UNET = {"name": "pocket", "components": {"unet": "UNet2DConditionModel"}, "prediction_type": "epsilon"}


def refusal(action: Callable[[], Any], *words: str) -> str:
    with pytest.raises(AdapterError) as error:
        action()
    assert_one_sentence(error, *words)
    return str(error.value)


# Half a turn


@pytest.mark.parametrize("degrees", [179.5, 180.0])
def test_half_a_turn_is_refused_by_layer_and_angle(degrees: float) -> None:
    part = turning(degrees / 2)
    for action in (lambda: compose([part, part]), lambda: power(part, 2), lambda: subtract(part, power(part, -1))):
        refusal(action, "unet.a", f"{degrees:.2f} degrees", "179 degrees", "power")
    assert gap(dense(compose([part, power(part, 0.9)])), dense(turning(degrees * 0.95))) < 1e-5


def test_the_worst_layer_is_named() -> None:
    one, other = turning(89.8, layer="a"), turning(89.9, layer="b")
    refusal(lambda: compose([one, other, one, other]), "unet.b", "179.80")


def test_what_is_half_a_turn_apart_has_nothing_between() -> None:
    there, back = turning(90), turning(-90)
    refusal(lambda: interpolate(there, back, 0.5), "unet.a", "180.00 degrees apart", "more than one")
    refusal(lambda: average([there, back]), "unet.a", "180.00 degrees apart")
    near = interpolate(turning(89), turning(-89), 0.25)
    assert gap(dense(near), dense(turning(44.5))) < 1e-5


def test_a_mean_that_is_not_unique_is_refused() -> None:
    refusal(lambda: average([turning(0), turning(120), turning(-120)]), "unet.a", "away from their mean", "several")
    fine = average([turning(0), turning(80), turning(-80)])
    assert gap(dense(fine), dense(turning(0))) < 1e-6


def test_a_mean_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [drawn(i, norm=0.6) for i in range(3)]
    average(files)
    monkeypatch.setattr(geodesics, "_STEPS", 1)
    refusal(lambda: average(files), "no mean of the adapters was found in unet.")


# What does not belong together


def series(norm: float) -> AdapterFile:
    config = OFTConfig(block_size=4, parametrisation="cayley_neumann")
    return adapter({"a": random_packed(6, 4, 1, norm)}, config=config, name="old")


def scaled() -> AdapterFile:
    file = drawn(1, name="scaled")
    state = {**file.components["unet"], "b.oft_scale.weight": torch.ones(6, 4)}
    return replace(file, components={"unet": state})


def twice() -> AdapterFile:
    return adapter({"a": random_packed(6, 4, 1), "text_model.a": random_packed(6, 4, 1)}, name="twice")


def output(size: int = 4) -> AdapterFile:
    return drawn(2, size, name=f"first{size}", config=OFTConfig(block_size=size, side="output"))


def based(name: str = "other", **base: Any) -> AdapterFile:
    return drawn(1, name=name, base={**UNET, **base})


CLASS = {"unet": "SD3Transformer2DModel"}
REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "nothing": (lambda: compose([]), ("nothing to combine",)),
    "features": (
        lambda: compose([drawn(1), adapter({"a": random_packed(4, 4, 1)}, name="cat")]),
        ("unet.a", "mug has 6 blocks of size 4", "cat has 4 blocks of size 4"),
    ),
    "sizes": (
        lambda: average([drawn(1, 4), drawn(2, 6)]),
        ("unet.a", "mug (1) has 6", "mug (2) has 4 blocks of size 6"),
    ),
    "output sizes": (lambda: compose([output(4), output(8)]), ("unet.a", "first4", "first8", "one size")),
    "sides": (lambda: compose([drawn(1), output()]), ("mug rotates the inputs of unet", "first4 their outputs")),
    "scales": (lambda: subtract(drawn(2), scaled()), ("adapter scaled scales the outputs of unet.b",)),
    "names": (lambda: power(twice(), 0.5), ("adapter twice", "unet.text_model.a.oft_R.weight twice")),
    "classes": (
        lambda: compose([based("mug"), based("cat", components=CLASS)]),
        ("mug", "unet is UNet2DConditionModel", "cat", "unet is SD3Transformer2DModel"),
    ),
    "classes of a component that only one adapts": (
        lambda: interpolate(based("mug"), drawn(2, part="vae", name="cat", base={"components": CLASS}), 0.5),
        ("mug", "cat", "unet is SD3Transformer2DModel"),
    ),
    "predictions": (
        lambda: compose([based("mug"), based("cat", prediction_type="v_prediction")]),
        ("prediction type is epsilon", "prediction type is v_prediction"),
    ),
    "a long series": (lambda: compose([drawn(2), series(1.1)]), ("adapter old, unet", "spectral norm of 1.1")),
    "t": (lambda: interpolate(drawn(1), drawn(2), math.nan), ("t nan",)),
    "text": (lambda: power(drawn(1), "2"), ("exponent '2'",)),  # type: ignore[arg-type]
    "weights": (lambda: average([drawn(1), drawn(2)], [1.0]), ("2 adapter(s)", "weights 1")),
    "a weight of 0": (lambda: average([drawn(1), drawn(2)], [1.0, 0.0]), ("weights 1, 0", "leave out")),
    "a weight below 0": (lambda: average([drawn(1), drawn(2)], [1.0, -0.5]), ("weights 1, -0.5", "interpolate")),
    "an infinite weight": (lambda: average([drawn(1)], [math.inf]), ("weight inf",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case: str) -> None:
    action, words = REFUSED[case]
    refusal(action, *words)


def test_adapters_that_say_nothing_of_their_base_go_with_any() -> None:
    assert not compose([based("mug"), drawn(2, name="cat"), drawn(3, name="dog", base={"name": "pocket"})]).notes


# What the result says


def test_metadata() -> None:
    mug = drawn(1, name="mug", trigger="sks", class_word="mug", base=UNET, training={"steps": 400})
    words = {"text_encoder": "CLIPTextModel"}
    style = drawn(2, part="text_encoder", name="style", trigger="xyz", base={"name": "SD", "components": words})
    result = compose([mug, style])
    said = result.metadata
    assert said.base == {**UNET, "components": {**UNET["components"], **words}}  # type: ignore[dict-item]
    assert (said.trigger, said.class_word) == (None, "mug")
    assert said.training["combined"] == "compose"
    assert [entry["name"] for entry in said.training["of"]] == ["mug", "style"]
    assert result.path.name == "compose(mug, style)"
    assert len(result.notes) == 2
    assert any("pocket (mug), SD (style)" in note for note in result.notes)
    assert any("triggers differ" in note and "sks, xyz" in note for note in result.notes)
    assert average([mug, drawn(3, trigger="sks")]).metadata.trigger == "sks"
    left = subtract(mug, style)
    assert (left.metadata.trigger, left.metadata.class_word) == ("sks", "mug")
    assert not any("trigger" in note for note in left.notes)
    assert power(mug, -0.5).metadata.trigger == "sks"
    assert power(mug, -0.5).metadata.training["exponent"] == -0.5
    assert interpolate(mug, mug, 0.25).metadata.training["t"] == 0.25
    assert average([mug, mug], [3, 1]).metadata.training["weights"] == [0.75, 0.25]


def test_settings_are_those_of_an_exact_rotation() -> None:
    first = OFTConfig(block_size=4, parametrisation="cayley_neumann", scaled=True, coft_eps=0.5, targets="attention")
    second = OFTConfig(block_size=4, targets="attention+mlp")
    files = [drawn(1, config=first), drawn(2, config=second)]
    assert compose(files).metadata.components["unet"] == OFTConfig(block_size=4, targets="attention+mlp")
    patterns = replace(first, targets=(".*attn.*",))
    assert compose([drawn(1, config=patterns), files[1]]).metadata.components["unet"].targets == (".*attn.*",)


def test_output_rotations_compose_in_the_same_order() -> None:
    files = [output(), drawn(5, config=OFTConfig(block_size=4, side="output"))]
    result = compose(files)
    assert result.metadata.components["unet"] == OFTConfig(block_size=4, side="output")
    assert gap(dense(result), dense(files[0]) @ dense(files[1])) < 1e-6


def attention(seed: int, roles: str = "qkv", **settings: Any) -> AdapterFile:
    config = OFTConfig(block_size=4, **{"share_qkv": True, **settings})
    tensors = {f"attn.to_{role}": random_packed(6, 4, seed, dtype=torch.float32) for role in roles}
    return adapter({**tensors, "attn.to_out.0": random_packed(6, 4, seed + 1, dtype=torch.float32)}, config=config)


def test_layers_that_share_a_generator_go_on_to_share_it() -> None:
    for result in (compose([attention(1), attention(2)]), average([attention(i) for i in range(3)])):
        assert result.metadata.components["unet"].share_qkv
        q, k, v = (result.components["unet"][f"attn.to_{role}{KEY}"] for role in "qkv")
        assert torch.equal(q, k)
        assert torch.equal(k, v)
        assert gap(q, result.components["unet"]["attn.to_out.0" + KEY]) > 0.01


@pytest.mark.parametrize("other", [attention(2, share_qkv=False), attention(2, "q"), attention(2, "kv")])
def test_they_no_longer_share_one_where_an_adapter_does_not(other: AdapterFile) -> None:
    assert not compose([attention(1), other]).metadata.components["unet"].share_qkv


def test_an_adapter_of_other_layers_alone_does_not_end_the_sharing() -> None:
    config = OFTConfig(block_size=4, share_qkv=True)
    elsewhere = drawn(2, config=config)
    words = drawn(3, part="text_encoder", config=replace(config, share_qkv=False))
    result = compose([attention(1), elsewhere, words])
    assert result.metadata.components["unet"].share_qkv
    assert not result.metadata.components["text_encoder"].share_qkv


@pytest.mark.parametrize("size", [4, 8])
def test_saved_and_read_again(size: int, tmp_path: Path) -> None:
    save_adapter_file(tmp_path / "mug", drawn(1).components, replace(drawn(1).metadata, trigger="sks"))
    mug = load_adapter_file(tmp_path / "mug")
    other = drawn(2, size, layers="bc", name="style")
    result = compose([mug, other])
    read = load_adapter_file(save_adapter_file(tmp_path / "both.safetensors", result.components, result.metadata))
    assert read.metadata.components == result.metadata.components
    assert read.metadata.components["unet"].block_size == (4 if size == 4 else "mixed")
    assert read.metadata.trigger == "sks"
    assert read.metadata.training["of"][0] == {"name": "mug", "sha256": mug.metadata.sha256}
    for key, tensor in result.components["unet"].items():
        assert torch.equal(read.components["unet"][key], tensor)
    again = average([read, mug])
    assert again.path.name == "average(both, mug)"
    assert again.metadata.training["of"][0]["sha256"] == read.metadata.sha256
