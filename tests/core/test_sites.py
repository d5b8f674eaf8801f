"""What files of other tools need: several block sizes in one adapter, rotated outputs and rotated patches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oft_diffusion import OFTConfig, inject_oft, merge_oft, oft_state_dict, remove_oft, unmerge_oft
from oft_diffusion.errors import AdapterError, AdapterFileError, ConfigError
from oft_diffusion.inject import inject_state, load_oft_state_dict
from oft_diffusion.rotation import packed_size, rotation_delta


class Net(nn.Module):
    """Linear layers of several widths, and convolutions of every kind of padding and stride."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1)
        self.circular = nn.Conv2d(6, 8, (3, 1), padding=(1, 0), padding_mode="circular", bias=False)
        self.point = nn.Conv2d(8, 12, 1)
        self.first = nn.Linear(12, 18)
        self.second = nn.Linear(18, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.circular(self.conv(x)).tanh()).tanh()
        y: Tensor = self.second(self.first(x.movedim(1, -1)).tanh())
        return y


def generators(shapes: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
    """Per layer `(r, b)`, a generator of about half a turn."""
    source = torch.Generator().manual_seed(seed)
    sizes = {f"{name}.oft_R.weight": (r, packed_size(b)) for name, (r, b) in shapes.items()}
    return {key: 0.2 * torch.randn(shape, generator=source) for key, shape in sizes.items()}


def rotations(state: dict[str, Tensor], layer: str, config: OFTConfig) -> Tensor:
    """The dense rotation `(n, n)` of a layer, in float64."""
    delta = rotation_delta(state[f"{layer}.oft_R.weight"].double(), config)
    return torch.block_diag(*(delta + torch.eye(delta.shape[-1], dtype=torch.float64)))


def weight_of(model: nn.Module, layer: str) -> Tensor:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight


INPUT = {"conv": (3, 12), "circular": (6, 3), "point": (2, 4), "first": (4, 3), "second": (3, 6)}
OUTPUT = {"conv": (3, 2), "circular": (2, 4), "point": (4, 3), "first": (2, 9), "second": (5, 2)}


def dense(model: Net, state: dict[str, Tensor], config: OFTConfig, scales: dict[str, Tensor] | None = None) -> Net:
    """The model with rotated weights, in float64: `W R^T` over inputs or flattened patches, `R^T W` over outputs."""
    result = copy.deepcopy(model).double()
    for key in state:
        layer = key.removesuffix(".oft_R.weight")
        weight, turn = weight_of(result, layer), rotations(state, layer, config)
        flat = weight.data.flatten(1)
        if config.side == "output":
            flat = turn.T @ flat
            if scales and layer in scales:
                flat = scales[layer].double().flatten().unsqueeze(1) * flat
        else:
            flat = flat @ turn.T
        weight.data.copy_(flat.view(weight.shape))
    return result


@pytest.fixture
def model() -> Net:
    return Net().eval()


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("parametrisation", ["cayley", "cayley_neumann", "cayley_series"])
@pytest.mark.parametrize(("side", "shapes"), [("input", INPUT), ("output", OUTPUT)])
def test_live_merged_and_unmerged_are_the_dense_rotation(
    model: Net, side: Any, shapes: dict[str, tuple[int, int]], parametrisation: Any
) -> None:
    config = OFTConfig(side=side, parametrisation=parametrisation, neumann_order=4)
    state = generators(shapes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model(X)
    bank = inject_state(model, config, state)
    bank.freeze("default")
    assert len(bank.adapters["default"].parts) == len({b for _, b in shapes.values()})
    assert bank.adapters["default"].config.block_size == "mixed"
    wanted = dense(Net().eval(), state, config)(X.double()).float()
    assert float((plain - wanted).abs().max()) > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=2e-6)
        saved = oft_state_dict(model)
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], state[key]) for key in state)
        merge_oft(model)
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=2e-6)
        unmerge_oft(model)
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=2e-6)
    remove_oft(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(X), plain)


def test_one_layer_at_a_time(model: Net) -> None:
    for side, shapes in (("input", INPUT), ("output", OUTPUT)):
        for layer in shapes:
            config = OFTConfig(side=side)  # type: ignore[arg-type]
            state = {key: t for key, t in generators(shapes).items() if key.startswith(f"{layer}.")}
            inject_state(model, config, state).freeze("default")
            got = model(X)
            remove_oft(model)
            torch.testing.assert_close(got, dense(model, state, config)(X.double()).float(), rtol=0, atol=2e-6)


def test_gradients_flow_through_patches_and_outputs(model: Net) -> None:
    for side, shapes in (("input", INPUT), ("output", OUTPUT)):
        bank = inject_state(model, OFTConfig(side=side), generators(shapes))  # type: ignore[arg-type]
        y = model(X)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()  # which no rotation leaves alone
        for parameter in bank.parameters():
            assert parameter.grad is not None
            assert (parameter.grad.abs().amax(1) > 0).all()
        remove_oft(model)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, -1.0])
def test_strength_of_scaled_outputs(model: Net, strength: float) -> None:
    config, state = OFTConfig(side="output"), generators({"first": (2, 9), "second": (5, 2)})
    scales = {"first": 1.0 + 0.3 * torch.rand(2, 9, generator=torch.Generator().manual_seed(3))}
    state["first.oft_scale.weight"] = scales["first"]
    bank = inject_state(model, config, state)
    bank.freeze("default")
    turned = {k: t for k, t in state.items() if "oft_R" in k}
    full = dense(Net().eval(), turned, config, scales)
    bank.set_adapters(["default"], strength, mode="linear")
    blended = Net().eval().double()
    for name, p in blended.named_parameters():
        p.data.lerp_(dict(full.named_parameters())[name].data, strength)
    torch.testing.assert_close(model(X), blended(X.double()).float(), rtol=0, atol=2e-6)
    bank.set_adapters(["default"], strength)
    got = model(X)
    if strength in (0.0, 1.0):
        torch.testing.assert_close(got, blended(X.double()).float(), rtol=0, atol=2e-6)
    merge_oft(model)
    torch.testing.assert_close(model(X), got, rtol=0, atol=2e-6)


def test_a_scale_that_has_no_powers_is_refused_at_a_fraction(model: Net) -> None:
    state = generators({"second": (5, 2)}) | {"second.oft_scale.weight": torch.tensor([[-1.0, 1.0]] * 5)}
    bank = inject_state(model, OFTConfig(side="output"), state)
    bank.freeze("default")
    with pytest.raises(AdapterError, match=r"scales outputs by -1.*positive factors.*linear"):
        bank.set_adapters(["default"], 0.5)
    bank.set_adapters(["default"], 0.5, mode="linear")


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")])
def test_adapters_of_many_sizes_and_sides_keep_their_order(model: Net, order: tuple[str, ...]) -> None:
    made = {
        "a": (OFTConfig(), generators({"first": (4, 3), "second": (3, 6), "circular": (6, 3)}, 1)),
        "b": (OFTConfig(), generators({"first": (2, 6), "second": (6, 3), "circular": (9, 2)}, 2)),
        "c": (OFTConfig(side="output"), generators({"first": (6, 3), "second": (5, 2)}, 3)),
    }
    wanted = Net().eval().double()
    for name in ("a", "b", "c"):
        inject_state(model, *made[name], name).freeze(name)
    bank = inject_state(model, *made["c"], "other")
    bank.freeze("other")
    bank.delete_adapter("other")
    bank.set_adapters(order)
    with torch.no_grad():
        for layer in ("first", "second"):
            weight = weight_of(wanted, layer)
            turn = torch.eye(weight.shape[1], dtype=torch.float64)
            for name in order:
                if name != "c":
                    turn = turn @ rotations(made[name][1], layer, made[name][0])
            weight.copy_(rotations(made["c"][1], layer, made["c"][0]).T @ weight @ turn.T)
        got = model(X)
        merge_oft(model)
        torch.testing.assert_close(model(X), got, rtol=0, atol=3e-6)
        unmerge_oft(model)
        for name in ("a", "b"):  # of convolutions there is a test of its own
            state = made[name][1]
            load_oft_state_dict(model, {k: t * ("circular" not in k) for k, t in state.items()}, name)
        torch.testing.assert_close(model(X), wanted(X.double()).float(), rtol=0, atol=3e-6)


def test_of_two_rotated_outputs_only_the_first_can_be_merged(model: Net) -> None:
    for seed, name in enumerate(("early", "late")):
        inject_state(model, OFTConfig(side="output"), generators(OUTPUT, seed), name).freeze(name)
    with torch.no_grad():
        got = model(X)
        with pytest.raises(AdapterError, match="'late' cannot be merged while 'early', which acts before it"):
            merge_oft(model, ["late"])
        merge_oft(model, ["early"])
        torch.testing.assert_close(model(X), got, rtol=0, atol=3e-6)
        unmerge_oft(model)
        torch.testing.assert_close(model(X), got, rtol=0, atol=3e-6)


def test_shapes_that_fit_no_side_are_refused(model: Net) -> None:
    for config, shapes, words in (
        (OFTConfig(), {"first": (6, 3)}, r"first has shape \(6, 3\), not \(4, 3\)"),
        (OFTConfig(), {"conv": (9, 2)}, r"conv has shape \(9, 1\), not \(2, 1\)"),
        (OFTConfig(side="output"), {"second": (9, 2)}, r"second has shape \(9, 1\), not \(5, 1\)"),
        (OFTConfig(), {"second": (2, 5)}, "blocks that divide its 18 features, as 5 does not"),
    ):
        with pytest.raises(AdapterFileError, match=words):
            inject_state(model, config, generators(shapes))
    assert not model.conv._forward_hooks


@pytest.mark.parametrize("config", [{"side": "output"}, {"block_size": "mixed"}])
def test_what_only_files_have_cannot_be_trained(model: Net, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="describes a file of another tool"):
        inject_oft(model, OFTConfig(targets=".*first", **config))


def test_channels_turn_before_patches(model: Net) -> None:
    made = {"channels": generators({"circular": (3, 2)}, 1), "patches": generators({"circular": (6, 3)}, 2)}
    for name, state in made.items():
        bank = inject_state(model, OFTConfig(), state, name)
        bank.freeze(name)
    with torch.no_grad():
        got = model(X)
        merge_oft(model)
        torch.testing.assert_close(model(X), got, rtol=0, atol=3e-6)
        unmerge_oft(model)
        with pytest.raises(AdapterError, match="'channels' turns the channels of circular after 'patches'"):
            bank.set_adapters(["patches", "channels"])
        torch.testing.assert_close(model(X), got, rtol=0, atol=3e-6)


def test_which_blocks_a_stage_takes_is_sent_to_a_device_once() -> None:
    net = Net()
    inject_oft(net, OFTConfig(block_size=6, targets="first"), "one")
    bank = inject_oft(net, OFTConfig(block_size=6, targets="first|second"), "two")
    bank.set_adapters(["one", "two"])
    members = [member for stage in bank._stages for member in stage.members]
    some = [member for member in members if member.rows is not None]
    assert some
    for member in some:
        with torch.inference_mode():  # as a first picture may be
            sent = member.rows_on(torch.device("meta"))
        assert sent is not None
        assert sent.is_meta
        assert member.rows_on(torch.device("meta")) is sent
        assert not sent.is_inference()
