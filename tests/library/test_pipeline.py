"""Adapters in a pipeline. Generators have spectral norm 0.5, so that every one of them moves the picture."""

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from oft_diffusion import (
    OFTConfig,
    fuse_oft,
    inject_oft,
    list_oft_adapters,
    load_oft_weights,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.inject import require_bank
from tests.library.support import (
    BOTH,
    assert_one_sentence,
    assert_unchanged,
    distance,
    draw,
    excite,
    fingerprint,
    folder_bytes,
)

MOVED = 0.01  # of a picture's range, far above what rounding does
ROUNDING = 1e-5


def names(pipe):
    return [a.name for a in list_oft_adapters(pipe)]


# Round trip


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(block_size=8),
        OFTConfig(block_size=16, parametrisation="cayley_neumann", neumann_order=4),
        OFTConfig(block_size=4, targets="all-linear"),
        OFTConfig(block_size="auto", targets="attention+mlp", coft_eps=10.0),
    ],
    ids=["cayley", "series", "small blocks", "auto"],
)
def test_a_reloaded_adapter_draws_the_same_picture_bit_by_bit(pipe, base_pipe, untouched, tmp_path, config):
    trained = pipe
    for seed, part in enumerate(BOTH):
        excite(inject_oft(getattr(trained, part), config, "mug"), "mug", seed=seed)
    picture = draw(trained)
    assert distance(picture, untouched) > MOVED
    path = save_oft_weights(trained, tmp_path, "mug")
    unload_oft_weights(trained)
    assert torch.equal(draw(trained), untouched)
    load_oft_weights(trained, path)
    assert torch.equal(draw(trained), picture)


def test_a_scaled_adapter_comes_back_up_to_one_rounding(pipe, untouched, tmp_path):
    bank = inject_oft(pipe.unet, OFTConfig(block_size=8, scaled=True), "mug")
    excite(bank, "mug", norm=0.5 * 2 * 7**0.5)
    picture = draw(pipe)
    path = save_oft_weights(pipe, tmp_path, "mug")
    unload_oft_weights(pipe)
    load_oft_weights(pipe, path, adapter_name="again")
    assert distance(picture, untouched) > MOVED
    assert distance(draw(pipe), picture) < ROUNDING
    again = save_oft_weights(pipe, tmp_path / "again", "again")
    assert load_adapter_file(again).metadata.sha256 == load_adapter_file(path).metadata.sha256


def test_metadata_survives_loading_and_saving(pipe, mug, tmp_path):
    loaded = load_oft_weights(pipe, mug, adapter_name="other")
    assert (loaded.name, loaded.strength, loaded.fused) == ("other", 1.0, False)
    assert set(loaded.components) == set(BOTH)
    assert loaded.metadata is not None
    assert (loaded.metadata.trigger, loaded.metadata.class_word) == ("sks", "mug")
    assert loaded.metadata.base["components"] == {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    again = load_adapter_file(save_oft_weights(pipe, tmp_path, "other")).metadata
    first = load_adapter_file(mug).metadata
    for field in ("components", "base", "trigger", "class_word", "training", "sha256"):
        assert getattr(again, field) == getattr(first, field)


def test_loaded_adapters_are_frozen(pipe, mug):
    load_oft_weights(pipe, mug)
    for part in BOTH:
        module = getattr(pipe, part)
        assert not any(p.requires_grad for p in (*module.parameters(), *require_bank(module).parameters()))


# Strength


def test_strength_zero_is_the_base_and_one_is_as_trained(pipe, mug, untouched):
    load_oft_weights(pipe, mug, adapter_name="mug")
    full = draw(pipe)
    assert distance(full, untouched) > MOVED
    set_oft_adapters(pipe, "mug", 0)
    assert torch.equal(draw(pipe), untouched)
    set_oft_adapters(pipe, "mug", 0.5)
    half = draw(pipe)
    assert distance(half, untouched) > MOVED / 4
    assert distance(half, full) > MOVED / 4
    set_oft_adapters(pipe, ["mug"], [1])
    assert torch.equal(draw(pipe), full)
    set_oft_adapters(pipe, [])
    assert torch.equal(draw(pipe), untouched)
    assert [(a.name, a.strength) for a in list_oft_adapters(pipe)] == [("mug", None)]


@pytest.mark.parametrize("strength", [0.0, 0.3, -1.0, 1.7])
def test_loading_at_a_strength_is_loading_and_setting_it(pipe, mug, untouched, strength):
    assert load_oft_weights(pipe, mug, adapter_name="mug", strength=strength).strength == strength
    picture = draw(pipe)
    assert torch.equal(picture, untouched) == (strength == 0)
    set_oft_adapters(pipe, "mug", 1.0)
    set_oft_adapters(pipe, "mug", strength)
    assert torch.equal(draw(pipe), picture)


def test_linear_blend_differs_from_the_rotation_between_and_agrees_at_the_ends(pipe, mug, untouched):
    load_oft_weights(pipe, mug, adapter_name="mug")
    full = draw(pipe)
    set_oft_adapters(pipe, "mug", 0.5)
    rotated = draw(pipe)
    set_oft_adapters(pipe, "mug", 0.5, mode="linear")
    assert distance(draw(pipe), rotated) > ROUNDING
    for strength, expected in ((0.0, untouched), (1.0, full)):
        set_oft_adapters(pipe, "mug", strength, mode="linear")
        assert torch.equal(draw(pipe), expected)


def test_loading_another_adapter_leaves_the_first_ones_strength_and_mode(pipe, mug, style):
    load_oft_weights(pipe, mug, adapter_name="mug")
    set_oft_adapters(pipe, "mug", 0.5, mode="linear")
    load_oft_weights(pipe, style, adapter_name="style", strength=0.7)
    active = require_bank(pipe.unet).active
    assert [(a.name, a.strength, a.mode) for a in active] == [("mug", 0.5, "linear"), ("style", 0.7, "rotation")]


# Several adapters


def test_adapters_add_up_in_the_order_of_loading_and_of_setting(pipe, mug, style, untouched):
    load_oft_weights(pipe, mug, adapter_name="mug")
    alone = draw(pipe)
    load_oft_weights(pipe, style, adapter_name="style")
    assert names(pipe) == ["mug", "style"]
    both = draw(pipe)
    set_oft_adapters(pipe, ["style", "mug"])
    swapped = draw(pipe)
    for other in (untouched, alone, swapped):
        assert distance(both, other) > MOVED / 2
    set_oft_adapters(pipe, ["mug", "style"], [1.0, 1.0])
    assert torch.equal(draw(pipe), both)
    set_oft_adapters(pipe, "mug")
    assert torch.equal(draw(pipe), alone)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("order", [["mug", "style"], ["style", "mug"]])
@pytest.mark.parametrize("strengths", [1.0, [0.6, -0.8]])
def test_live_is_fused_in_either_order(pipe, mug, style, untouched, order, strengths):
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style")
    set_oft_adapters(pipe, order, strengths)
    live = draw(pipe)
    fuse_oft(pipe)
    assert all(a.fused for a in list_oft_adapters(pipe))
    assert distance(live, untouched) > MOVED
    assert distance(draw(pipe), live) < ROUNDING
    unfuse_oft(pipe)
    assert torch.equal(draw(pipe), live)


def test_adapters_of_other_components_and_block_sizes_meet(pipe, make, style, words, untouched):
    wide = make("wide", seed=4, parts=("unet",), config=OFTConfig(block_size=16, targets="attention+mlp"))
    pictures = [untouched]
    for path, parts in ((style, ("unet",)), (words, ("text_encoder",)), (wide, ("unet",))):
        loaded = load_oft_weights(pipe, path)
        assert loaded.components == parts
        pictures.append(draw(pipe))
        assert distance(pictures[-1], pictures[-2]) > MOVED / 4
    set_oft_adapters(pipe, ["style", "words"], [1.0, 0.0])
    assert torch.equal(draw(pipe), pictures[1])
    set_oft_adapters(pipe, ["style", "words"])
    assert torch.equal(draw(pipe), pictures[2])
    set_oft_adapters(pipe, "words")
    assert require_bank(pipe.unet).active == ()
    fuse_oft(pipe)
    assert [a.name for a in list_oft_adapters(pipe) if a.fused] == ["words"]


def test_adapters_are_listed_in_the_order_of_loading(pipe, style, words, mug):
    for path in (style, words, mug):
        load_oft_weights(pipe, path, adapter_name=path.stem)
    assert sorted(names(pipe)) == ["mug", "style", "words"]
    for part in BOTH:
        mine = [name for name in names(pipe) if name in require_bank(getattr(pipe, part)).adapters]
        assert mine == list(require_bank(getattr(pipe, part)).adapters)


# Unloading


def test_unloading_leaves_the_pipeline_as_it_was(pipe, mug, style, untouched, tmp_path):
    pipe.unet.conv_in.weight.requires_grad_(False)  # what was frozen before stays so, what was not becomes free again
    before = fingerprint(pipe)
    pipe.save_pretrained(tmp_path / "before")
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style", strength=0.4)
    pipe.save_pretrained(tmp_path / "while")
    assert not torch.equal(draw(pipe), untouched)
    fuse_oft(pipe)
    unfuse_oft(pipe)
    unload_oft_weights(pipe)
    assert_unchanged(pipe, before)
    pipe.save_pretrained(tmp_path / "after")
    assert folder_bytes(tmp_path / "while") == folder_bytes(tmp_path / "before")
    assert folder_bytes(tmp_path / "after") == folder_bytes(tmp_path / "before")
    assert torch.equal(draw(pipe), untouched)
    assert list_oft_adapters(pipe) == []


def test_unloading_one_by_one(pipe, mug, style, untouched):
    before = fingerprint(pipe)
    load_oft_weights(pipe, style, adapter_name="style")
    alone = draw(pipe)
    load_oft_weights(pipe, mug, adapter_name="mug")
    unload_oft_weights(pipe, "mug")
    assert names(pipe) == ["style"]
    assert torch.equal(draw(pipe), alone)
    unload_oft_weights(pipe, "style")
    assert_unchanged(pipe, before)
    with pytest.raises(AdapterError) as error:
        unload_oft_weights(pipe)
    assert_one_sentence(error, "no OFT adapter")


# Names and settings that are wrong


def test_unknown_and_repeated_names_change_nothing(pipe, mug, style, words):
    for path in (mug, style, words):
        load_oft_weights(pipe, path, adapter_name=path.stem, strength=0.5)
    picture = draw(pipe)
    wrong = (
        (lambda: set_oft_adapters(pipe, "cup"), "'cup'"),
        (lambda: set_oft_adapters(pipe, ["mug", "cup"]), "'cup'"),
        (lambda: set_oft_adapters(pipe, ["mug", "mug"]), "'mug' is named twice"),
        (lambda: set_oft_adapters(pipe, ["mug", "style", "style"]), "'style' is named twice"),
        (lambda: set_oft_adapters(pipe, ["style", "words", "words"]), "'words' is named twice"),
        (lambda: set_oft_adapters(pipe, ["mug", "style"], [1.0]), "2 adapter(s) but 1 strength(s)"),
        (lambda: set_oft_adapters(pipe, "mug", float("nan")), "nan"),
        (lambda: set_oft_adapters(pipe, ["style", "words"], [0.1, float("inf")]), "inf"),
        (lambda: set_oft_adapters(pipe, ["words", "style"], [0.1, float("inf")]), "inf"),
        (lambda: set_oft_adapters(pipe, "mug", mode="cubic"), "cubic"),  # type: ignore[arg-type]
        (lambda: fuse_oft(pipe, ["cup"]), "'cup'"),
        (lambda: unload_oft_weights(pipe, "cup"), "'cup'"),
        (lambda: save_oft_weights(pipe, "nowhere", "cup"), "'cup'"),
        (lambda: load_oft_weights(pipe, mug, adapter_name="mug"), "'mug'"),
        (lambda: load_oft_weights(pipe, mug, adapter_name="a b"), "'a b'"),
        (lambda: load_oft_weights(pipe, mug, adapter_name="other", strength=float("nan")), "nan"),
    )
    for action, shown in wrong:
        with pytest.raises(AdapterError) as error:
            action()
        assert_one_sentence(error, shown)
        assert torch.equal(draw(pipe), picture), shown
        assert sorted(names(pipe)) == ["mug", "style", "words"]


def test_a_series_past_its_range_is_refused_at_a_fraction_and_nothing_changes(pipe, tmp_path, mug):
    load_oft_weights(pipe, mug, adapter_name="mug")
    for part in BOTH:
        bank = inject_oft(getattr(pipe, part), OFTConfig(block_size=8, parametrisation="cayley_neumann"), "long")
        excite(bank, "long", norm=1.2)
    path = save_oft_weights(pipe, tmp_path, "long")
    unload_oft_weights(pipe, "long")
    picture = draw(pipe)
    with pytest.raises(AdapterError) as error:
        load_oft_weights(pipe, path, adapter_name="long", strength=0.5)
    assert_one_sentence(error, "norm")
    assert names(pipe) == ["mug"]
    assert torch.equal(draw(pipe), picture)

    load_oft_weights(pipe, path, adapter_name="long")
    picture = draw(pipe)
    with pytest.raises(AdapterError) as error:
        set_oft_adapters(pipe, ["long", "mug"], [0.5, 1.0])
    assert_one_sentence(error, "norm")
    assert [(a.name, a.strength) for a in list_oft_adapters(pipe)] == [("mug", 1.0), ("long", 1.0)]
    assert torch.equal(draw(pipe), picture)


def test_without_any_adapter_every_verb_says_so(pipe):
    for action in (fuse_oft, unfuse_oft, unload_oft_weights, lambda p: set_oft_adapters(p, [])):
        with pytest.raises(AdapterError) as error:
            action(pipe)
        assert_one_sentence(error, "no OFT adapter", "load_oft_weights")
    assert list_oft_adapters(pipe) == []


# Pipelines that share components


def test_a_pipeline_made_from_another_shares_its_adapters(pipe, mug, untouched):
    load_oft_weights(pipe, mug, adapter_name="mug")
    adapted = draw(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert list_oft_adapters(other) == list_oft_adapters(pipe)
    set_oft_adapters(other, "mug", 0.0)
    assert torch.equal(draw(pipe), untouched)
    set_oft_adapters(pipe, "mug")
    assert torch.equal(draw(pipe), adapted)
    unload_oft_weights(other)
    assert list_oft_adapters(pipe) == []
    assert torch.equal(draw(pipe), untouched)
