"""Arithmetic on adapters: the laws of the group, against dense references that are written here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oft_diffusion import geodesics, matching
from oft_diffusion.arithmetic import MAX_ANGLE, Combined, average, compose, interpolate, power, subtract
from oft_diffusion.config import OFTConfig
from oft_diffusion.files import AdapterFile
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.rotation import cayley_delta, pack, unpack
from tests.core.reference import SEEDS, dense_cayley, dense_series, random_packed

TOLERANCE = 2e-6  # entries of R; generators are stored in float32
SIZES = st.sampled_from([2, 3, 4, 8])
FEATURES = 24
KEY = ".oft_R.weight"


def adapter(
    layers: Mapping[str, Tensor], *, name: str = "mug", part: str = "unet", config: OFTConfig | None = None, **said: Any
) -> AdapterFile:
    """A file in memory, of packed generators by layer."""
    [size, *others] = {unpack(packed).shape[-1] for packed in layers.values()}
    config = config or OFTConfig(block_size="mixed" if others else size)
    state = {layer + KEY: packed for layer, packed in layers.items()}
    return AdapterFile(Path(f"{name}.safetensors"), {part: state}, AdapterMetadata({part: config}, **said))


def drawn(seed: int, size: int = 4, *, norm: float = 0.4, layers: str = "ab", **said: Any) -> AdapterFile:
    """Generators that commute with no other's, on layers of 24 features."""
    tensors = {
        layer: random_packed(FEATURES // size, size, seed * 7 + ord(layer), norm, torch.float32) for layer in layers
    }
    return adapter(tensors, **said)


def dense(file: AdapterFile, layer: str = "a", part: str = "unet") -> Tensor:
    """A layer's whole rotation `(in, in)`, float64."""
    return torch.block_diag(*dense_cayley(file.components[part][layer + KEY]))


def logarithm(rotation: Tensor) -> Tensor:
    """The principal logarithm, by the eigenvalues of the whole matrix."""
    values, vectors = torch.linalg.eig(rotation)
    return (vectors @ torch.diag(1j * values.angle()) @ torch.linalg.inv(vectors)).real


def dense_power(rotation: Tensor, exponent: float) -> Tensor:
    return torch.linalg.matrix_exp(exponent * logarithm(rotation))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def length(a: Tensor, b: Tensor) -> float:
    """The geodesic distance."""
    return float(logarithm(a.T @ b).norm())


def turning(degrees: float, layer: str = "a") -> AdapterFile:
    """Turns one plane of the second block by that angle."""
    packed = torch.zeros(6, 6)
    packed[1, 0] = math.tan(math.radians(degrees) / 2)
    return adapter({"quiet": torch.zeros_like(packed), layer: packed}, name=f"turn{degrees:g}")


# Composition


@given(seed=SEEDS, size=SIZES)
def test_composing_is_the_product_in_the_order_in_which_x_meets_them(seed: int, size: int) -> None:
    files = [drawn(seed + i, size) for i in range(3)]
    result = compose(files)
    a, b, c = map(dense, files)
    assert gap(dense(result), a @ b @ c) < TOLERANCE
    if size > 2:
        assert gap(dense(result), c @ b @ a) > 1e-3


@given(seed=SEEDS, size=SIZES)
def test_composing_is_associative(seed: int, size: int) -> None:
    a, b, c = (drawn(seed + i, size) for i in range(3))
    left, right = compose([compose([a, b]), c]), compose([a, compose([b, c])])
    assert gap(dense(left), dense(right)) < TOLERANCE
    assert gap(dense(left, "b"), dense(right, "b")) < TOLERANCE


def test_composing_one_gives_it_back_and_inputs_stay_as_they_are() -> None:
    file = drawn(1)
    before = {key: tensor.clone() for key, tensor in file.components["unet"].items()}
    alone = compose([file])
    compose([file, drawn(2)])
    for key, tensor in before.items():
        assert torch.equal(file.components["unet"][key], tensor)
        assert gap(alone.components["unet"][key], tensor) < 1e-6
        assert alone.components["unet"][key].dtype == torch.float32


@given(seed=SEEDS, size=SIZES)
def test_subtracting_undoes_composing(seed: int, size: int) -> None:
    a, b = drawn(seed, size), drawn(seed + 1, size)
    rest = subtract(a, b)
    assert gap(dense(compose([rest, b])), dense(a)) < TOLERANCE
    assert gap(dense(rest), dense(a) @ dense(b).T) < TOLERANCE
    assert gap(dense(subtract(compose([a, b]), b)), dense(a)) < TOLERANCE
    assert gap(dense(subtract(a, a)), torch.eye(FEATURES, dtype=torch.float64)) < TOLERANCE


# Powers


@given(seed=SEEDS, size=SIZES, norm=st.sampled_from([1e-4, 0.4, 3.0]))
def test_powers(seed: int, size: int, norm: float) -> None:
    a = drawn(seed, size, norm=norm)
    half = power(a, 0.5)
    assert gap(dense(half), dense_power(dense(a), 0.5)) < TOLERANCE
    assert gap(dense(compose([half, half])), dense(a)) < TOLERANCE
    assert gap(dense(power(a, -1)), dense(a).T) < TOLERANCE
    assert gap(dense(power(a, 1)), dense(a)) < TOLERANCE
    assert not any(t.any() for t in power(a, 0).components["unet"].values())
    # Small angles keep their digits.
    packed = a.components["unet"]["a" + KEY]
    assert gap(power(a, 1).components["unet"]["a" + KEY], packed) < 2e-6 * norm * max(1.0, norm)


@given(seed=SEEDS, first=st.floats(-1.5, 1.5), second=st.floats(-1.5, 1.5))
def test_exponents_add_up(seed: int, first: float, second: float) -> None:
    a = drawn(seed)
    assert gap(dense(compose([power(a, first), power(a, second)])), dense(power(a, first + second))) < TOLERANCE


def test_a_power_past_half_a_turn_is_what_is_left_of_whole_turns() -> None:
    assert gap(dense(power(turning(100), 2)), dense(turning(-160))) < TOLERANCE


# The geodesic


@given(seed=SEEDS, size=SIZES, t=st.floats(-1.0, 2.0))
def test_interpolation_follows_the_geodesic(seed: int, size: int, t: float) -> None:
    a, b = drawn(seed, size), drawn(seed + 1, size)
    ra, rb = dense(a), dense(b)
    assert gap(dense(interpolate(a, b, t)), ra @ dense_power(ra.T @ rb, t)) < TOLERANCE
    assert length(dense(interpolate(a, b, t)), ra) == pytest.approx(abs(t) * length(ra, rb), abs=1e-5)


@given(seed=SEEDS, size=SIZES, norm=st.sampled_from([1e-4, 0.4, 0.9]))
def test_its_ends_and_its_middle(seed: int, size: int, norm: float) -> None:
    a, b = drawn(seed, size, norm=norm), drawn(seed + 1, size, norm=norm)
    assert gap(dense(interpolate(a, b, 0)), dense(a)) < 1e-6
    assert gap(dense(interpolate(a, b, 1)), dense(b)) < 1e-6
    middle = dense(interpolate(a, b, 0.5))
    assert length(middle, dense(a)) == pytest.approx(length(middle, dense(b)), abs=1e-5)
    assert length(middle, dense(a)) == pytest.approx(length(dense(a), dense(b)) / 2, abs=1e-5)
    assert gap(dense(interpolate(b, a, 0.5)), middle) < TOLERANCE


# The mean


@given(seed=SEEDS, size=SIZES, weights=st.tuples(*[st.floats(0.1, 5.0)] * 3))
def test_at_the_mean_the_pulls_cancel(seed: int, size: int, weights: tuple[float, ...]) -> None:
    files = [drawn(seed + i, size) for i in range(3)]
    mean = dense(average(files, weights))
    pull = sum(w * logarithm(mean.T @ dense(f)) for w, f in zip(weights, files, strict=True)) / sum(weights)
    assert torch.as_tensor(pull).abs().max() < TOLERANCE
    # No other point is better: neither the adapters nor the product of the mean with a small rotation.
    near = [mean @ dense(power(drawn(seed + 9, size), 0.01)), *map(dense, files)]
    cost = [sum(w * length(r, dense(f)) ** 2 for w, f in zip(weights, files, strict=True)) for r in (mean, *near)]
    assert cost[0] < min(cost[1:])


@given(seed=SEEDS, size=SIZES, count=st.integers(1, 3))
def test_the_mean_of_two_is_between_them_by_weight(seed: int, size: int, count: int) -> None:
    a, b = drawn(seed, size), drawn(seed + 1, size)
    t = 1 / (1 + count)
    expected = dense(interpolate(a, b, t))
    assert gap(dense(average([a, b], [count, 1])), expected) < TOLERANCE
    assert gap(dense(average([b, *[a] * count])), expected) < TOLERANCE  # three and more are searched for
    assert gap(dense(average([a, b, a, b])), dense(interpolate(a, b, 0.5))) < TOLERANCE


@given(seed=SEEDS, size=SIZES)
def test_the_mean_moves_with_a_rotation_that_all_share(seed: int, size: int) -> None:
    files, common = [drawn(seed + i, size) for i in range(3)], drawn(seed + 5, size)
    mean = average(files)
    assert gap(dense(average([compose([common, f]) for f in files])), dense(compose([common, mean]))) < TOLERANCE
    assert gap(dense(average([compose([f, common]) for f in files])), dense(compose([mean, common]))) < TOLERANCE
    assert gap(dense(average([power(f, -1) for f in files])), dense(mean).T) < TOLERANCE


@given(seed=SEEDS, size=SIZES)
def test_the_mean_knows_no_order_and_of_equal_ones_is_that_one(seed: int, size: int) -> None:
    a, b, c = (drawn(seed + i, size) for i in range(3))
    assert gap(dense(average([a, b, c])), dense(average([c, a, b]))) < TOLERANCE
    for equal in ([a], [a, a], [a, a, a]):
        assert gap(dense(average(equal)), dense(a)) < 1e-6


# Blocks and layers


@given(seed=SEEDS, small_first=st.booleans())
def test_smaller_blocks_are_put_together(seed: int, small_first: bool) -> None:
    files = [drawn(seed, 4), drawn(seed + 1, 12)]
    ordered = files if small_first else files[::-1]
    for result, expected in (
        (compose(ordered), dense(ordered[0]) @ dense(ordered[1])),
        (subtract(*ordered), dense(ordered[0]) @ dense(ordered[1]).T),
        (average([*ordered, drawn(seed + 2, 2)]), None),
    ):
        assert result.components["unet"]["a" + KEY].shape == (2, 66)
        assert result.metadata.components["unet"].block_size == 12
        assert expected is None or gap(dense(result), expected) < TOLERANCE


def test_layers_may_differ_in_size() -> None:
    small = adapter({"a": random_packed(6, 4, 1, dtype=torch.float32), "b": random_packed(6, 4, 2)})
    result = compose([small, drawn(3, 8, layers="a")])
    assert result.metadata.components["unet"].block_size == "mixed"
    assert gap(dense(result), dense(small) @ dense(drawn(3, 8))) < TOLERANCE
    assert gap(dense(result, "b"), dense(small, "b")) < TOLERANCE
    again = compose([result, result])
    assert gap(dense(again), dense(result) @ dense(result)) < TOLERANCE


def test_an_adapter_is_the_identity_where_it_has_no_layer() -> None:
    a, b = drawn(1, layers="ab"), drawn(2, layers="bc")
    words = drawn(3, layers="c", part="text_encoder")
    result = compose([a, b, words])
    assert {part: list(state) for part, state in result.components.items()} == {
        "unet": ["a" + KEY, "b" + KEY, "c" + KEY],
        "text_encoder": ["c" + KEY],
    }
    assert gap(dense(result, "a"), dense(a, "a")) < TOLERANCE
    assert gap(dense(result, "b"), dense(a, "b") @ dense(b, "b")) < TOLERANCE
    assert gap(dense(result, "c"), dense(b, "c")) < TOLERANCE
    assert gap(dense(result, "c", "text_encoder"), dense(words, "c", "text_encoder")) < TOLERANCE
    assert gap(dense(average([a, b]), "c"), dense_power(dense(b, "c"), 0.5)) < TOLERANCE
    assert gap(dense(interpolate(a, words, 0.25), "a"), dense_power(dense(a, "a"), 0.75)) < TOLERANCE


def test_layers_match_with_and_without_the_level_that_transformers_dropped() -> None:
    old = adapter({"text_model.encoder.fc": random_packed(6, 4, 1)}, part="text_encoder")
    new = adapter({"encoder.fc": random_packed(6, 4, 2)}, part="text_encoder")
    product = dense(old, "text_model.encoder.fc", "text_encoder") @ dense(new, "encoder.fc", "text_encoder")
    result = compose([old, new])
    assert list(result.components["text_encoder"]) == ["text_model.encoder.fc" + KEY]
    assert gap(dense(result, "text_model.encoder.fc", "text_encoder"), product) < TOLERANCE


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [drawn(i, layers="abcdef") for i in range(3)]
    whole = average(files)
    monkeypatch.setattr(matching, "_BATCH", 200)  # two layers of 6 blocks of 4
    sources = [matching.Source("mug", file) for file in files]
    assert len(list(matching.batches(matching.match_layers(sources), sources))) == 3
    for key, tensor in average(files).components["unet"].items():
        assert gap(tensor, whole.components["unet"][key]) < 1e-7


# Truncated series


@pytest.mark.parametrize("order", [3, 4, 5])
def test_of_a_series_the_nearest_rotation_is_taken(order: int) -> None:
    config = OFTConfig(block_size=4, parametrisation="cayley_neumann", neumann_order=order)
    packed = random_packed(6, 4, 1, 0.6)
    series = adapter({"a": packed}, config=config)
    left, values, right = torch.linalg.svd(dense_series(packed, order))
    result = compose([series, drawn(2, layers="a", name="style")])
    assert gap(dense(result), torch.block_diag(*(left @ right)) @ dense(drawn(2))) < TOLERANCE
    assert gap(dense(power(series, 0.5)), dense_power(torch.block_diag(*(left @ right)), 0.5)) < TOLERANCE
    [note] = result.notes
    assert "mug is a truncated series: its nearest rotations were taken, max |log radius| " in note
    assert float(note.rpartition(" ")[2]) == pytest.approx(float(values.log().abs().max()), rel=0.05)
    assert result.metadata.components["unet"].parametrisation == "cayley"
    assert not compose([result]).notes


# Half a turn


def test_up_to_the_limit_a_result_is_what_it_should_be() -> None:
    quarter, big = drawn(3, layers="a", norm=0.4), turning(MAX_ANGLE - 0.02)
    mixed = compose([quarter, big, power(quarter, -1)])  # the plane is tilted against the packing's axes
    whole = dense(quarter) @ dense(big) @ dense(quarter).T
    assert gap(dense(mixed), whole) < 1e-5
    live = cayley_delta(unpack(mixed.components["unet"]["a" + KEY]))  # as a forward in float32 has it
    assert gap(torch.block_diag(*live).double(), whole - torch.eye(FEATURES)) < 1e-4


def test_the_pieces_near_half_a_turn_are_finite() -> None:
    half = -2.0 * torch.eye(4, dtype=torch.float64)[None]  # D of -I
    nothing = torch.zeros_like(half)
    delta, apart = geodesics.between(nothing, half, 0.3)
    mean = geodesics.mean([nothing, half, nothing], [0.4, 0.3, 0.3])
    assert mean.farthest.item() == pytest.approx(math.pi)
    assert apart.item() == pytest.approx(math.pi)
    assert delta.isfinite().all()
    assert mean.delta.isfinite().all()
    assert geodesics.cayley_generators(half)[1].item() == pytest.approx(math.pi)


def test_generators_come_back_from_rotations() -> None:
    packed = torch.cat([random_packed(5, 8, 1, norm) for norm in (1e-9, 1e-3, 0.5, 50.0)])
    found, angle = geodesics.cayley_generators(cayley_delta(unpack(packed)))
    norms = torch.linalg.matrix_norm(unpack(packed), 2)
    assert ((found - packed).abs().amax(1) < 1e-11 * norms.clamp_min(1e-9) * norms.clamp_min(1.0)).all()
    assert gap(angle, 2 * torch.atan(norms)) < 1e-8
    assert torch.equal(pack(unpack(found)), found)


def test_results_are_files_in_memory_again() -> None:
    result = average([compose([drawn(1), drawn(2)]), power(drawn(3), 0.5)])
    assert isinstance(result, Combined)
    assert isinstance(result, AdapterFile)
