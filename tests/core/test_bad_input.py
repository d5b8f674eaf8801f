"""What injection refuses: one clear sentence each, and a model that is as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oft_diffusion import OFTConfig, inject_oft, load_oft_state_dict, merge_oft, oft_state_dict, remove_oft
from oft_diffusion.errors import AdapterError, AdapterFileError, ConfigError, OFTError, TargetError
from oft_diffusion.targets import choose_block_size, find_targets
from tests.core.reference import two_layers
from tests.library.support import assert_one_sentence, excite, tiny_unet


@pytest.fixture
def unet() -> Iterator[Any]:
    """A UNet that must be untouched once the test is over."""
    model = tiny_unet()
    trainable = [p.requires_grad for p in model.parameters()]
    yield model
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize(
    ("config", "kind", "names"),
    [
        # 32 divides cross_attention_dim, but not the width of 16.
        (OFTConfig(), TargetError, ["block_size=32", "attn1.to_q (16)", 'block_size="auto"', "16, 8, 4, 2"]),
        (OFTConfig(block_size=5), TargetError, ["block_size=5", "32 of 32 targets", "one of 16, 8, 4, 2"]),
        (OFTConfig(targets="nothing"), TargetError, ["'nothing' match no layer of UNet2DConditionModel", "to_q"]),
        (OFTConfig(targets=("nothing", "to_q")), TargetError, [r"write '.*\\.to_q': patterns match whole layer names"]),
        (OFTConfig(targets=("(",)), TargetError, ["'(' is no regular expression"]),
        (OFTConfig(targets=".*", block_size=8), TargetError, ["which OFT does not adapt", "linear layers"]),
    ],
)
def test_settings_that_do_not_fit_the_model(
    unet: Any, config: OFTConfig, kind: type[OFTError], names: list[str]
) -> None:
    with pytest.raises(kind) as error:
        inject_oft(unet, config)
    assert_one_sentence(error, *names)


def test_auto_takes_the_largest_of_64_32_and_16_that_fits(unet: Any) -> None:
    found = find_targets(unet, "attention")
    assert {t.in_features for t in found} == {16, 32}
    assert choose_block_size(found, "auto") == 16
    wide = find_targets(tiny_unet(width=64), "attention")
    assert choose_block_size(wide, "auto") == 32  # 64 does not divide the text width of 32
    assert choose_block_size([t for t in wide if t.in_features == 64], "auto") == 64
    with pytest.raises(TargetError) as error:
        choose_block_size(find_targets(two_layers(), ".*"), "auto")
    assert_one_sentence(error, "0 (24)", "8, 4, 2")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a.b", "items", "mug\n", None, 5])
def test_names_that_nothing_could_hold(unet: Any, name: Any) -> None:
    with pytest.raises(AdapterError) as error:
        inject_oft(unet, OFTConfig(block_size=8), name)
    assert_one_sentence(error, "adapter name", repr(name))


def test_a_name_that_is_taken_or_unknown() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8), "mug")
    with pytest.raises(AdapterError) as error:
        inject_oft(unet, OFTConfig(block_size=8), "mug")
    assert_one_sentence(error, "'mug' already exists on UNet2DConditionModel")
    for call in (
        lambda: remove_oft(unet, "cat"),
        lambda: bank.set_adapters("cat"),
        lambda: oft_state_dict(unet, "cat"),
    ):
        with pytest.raises(AdapterError) as error:
            call()
        assert_one_sentence(error, "no adapter 'cat'", "mug")


def test_a_layer_called_with_keywords_only_is_refused() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(input=x)

    model = ByKeyword()
    inject_oft(model, OFTConfig(block_size=8, targets=".*"))
    with pytest.raises(TargetError) as error:
        model(torch.randn(2, 16))
    assert_one_sentence(error, "layer layer was called with keyword arguments only")


def test_an_architecture_without_a_row_or_attention_says_what_to_pass() -> None:
    with pytest.raises(TargetError) as error:
        inject_oft(two_layers())
    assert_one_sentence(error, "Sequential has no row", "looks like targets='attention'", "regular expression")


def _without(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(state.items())[2:])


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {re.sub("attn1", "attn9", k): v for k, v in state.items()}


def _foreign(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "conv_in.oft_R.weight": torch.zeros(1, 28)}


def _misshaped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v[:1] for k, v in state.items()}


def _poisoned(value: float) -> Any:
    def poison(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.oft_R.weight"][0, 0] = value
        return state

    return poison


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_without, ["2 mismatch(es)", "is missing"]),
        (_renamed, ["32 mismatch(es)", "attn1.to_k is missing", "; ..."]),
        (_foreign, ["1 mismatch(es)", "conv_in.oft_R.weight matches no layer"]),
        (_misshaped, ["has shape (1, 28), not (2, 28)", "; ..."]),
        (_poisoned(float("nan")), ["attn1.to_q has values that are not finite"]),
        (_poisoned(float("inf")), ["attn1.to_q has values that are not finite"]),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Any, names: list[str]) -> None:
    unet = tiny_unet()
    excite(inject_oft(unet, OFTConfig(block_size=8)))
    before = oft_state_dict(unet)
    with pytest.raises(AdapterFileError) as error:
        load_oft_state_dict(unet, change(oft_state_dict(unet)))
    assert_one_sentence(error, *names)
    assert str(error.value).count(";") <= 3, "more than the first three mismatches"
    assert all(torch.equal(v, before[k]) for k, v in oft_state_dict(unet).items())


def test_a_state_is_not_written_into_a_merged_adapter() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    before = oft_state_dict(unet)
    other = {name: -tensor for name, tensor in before.items()}
    merge_oft(unet)
    for load in (
        lambda: load_oft_state_dict(unet, other),
        lambda: bank.load_state_dict({key: -value for key, value in bank.state_dict().items()}),
    ):
        with pytest.raises(AdapterError, match="'default' is merged into the weights") as error:
            load()
        assert_one_sentence(error, "unmerge_oft")
    assert all(torch.equal(v, before[k]) for k, v in oft_state_dict(unet).items())


@pytest.mark.parametrize("what", ["unet", None, 3, {"unet": 1}])
def test_what_is_no_module_is_told_to_be_a_component(what: Any) -> None:
    with pytest.raises(TargetError) as error:
        inject_oft(what)
    assert_one_sentence(error, f"a {type(what).__name__} is no torch module", "pipe.unet")


@pytest.mark.parametrize("strength", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5), [np.float16(0.5)]])
def test_strengths_of_other_libraries_are_numbers(strength: Any) -> None:
    bank = inject_oft(tiny_unet(), OFTConfig(block_size=8), "mug")
    bank.set_adapters("mug", strength)
    assert [(a.name, a.strength, type(a.strength)) for a in bank.active] == [("mug", 0.5, float)]


@pytest.mark.parametrize(
    ("names", "strengths", "words"),
    [
        ("mug", "1", ["strength '1' is no number"]),
        ("mug", None, ["strength None is no number"]),
        ("mug", True, ["strength True is no number"]),
        ("mug", [None], ["strength None is no number"]),
        ("mug", torch.zeros(2), ["1 adapter(s) but 2 strength(s)"]),
        ({"mug": 0.5}, 1.0, ["adapter names {'mug': 0.5}", "names and strengths apart"]),
        (5, 1.0, ["adapter names 5"]),
        ([5], 1.0, ["adapter names [5]"]),
        (None, 1.0, ["adapter names None"]),
    ],
)
def test_names_and_strengths_of_the_wrong_type(names: Any, strengths: Any, words: list[str]) -> None:
    bank = inject_oft(tiny_unet(), OFTConfig(block_size=8), "mug")
    before = bank.active
    with pytest.raises(AdapterError) as error:
        bank.set_adapters(names, strengths)
    assert_one_sentence(error, *words)
    assert bank.active == before


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"block_size": True}, "block_size=True"),
        ({"block_size": "big"}, "block_size='big'"),
        ({"block_size": 32.0}, "block_size=32.0"),
        ({"targets": []}, "targets=[]"),
        ({"targets": 5}, "targets=5"),
        ({"targets": None}, "targets=None"),
        ({"parametrisation": "exp"}, "parametrisation='exp'"),
        ({"neumann_order": 0}, "neumann_order=0"),
        ({"scaled": 1}, "scaled=1"),
        ({"share_qkv": "q"}, "share_qkv='q'"),
        ({"coft_eps": 0.0}, "coft_eps=0.0"),
        ({"coft_eps": float("nan")}, "coft_eps=nan"),
    ],
)
def test_a_config_is_checked_when_it_is_made(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as error:
        OFTConfig(**settings)
    assert_one_sentence(error, name)


def test_a_config_goes_round_and_refuses_unknown_settings() -> None:
    config = OFTConfig(block_size=16, targets=("a", "b"), coft_eps=0.1)
    assert OFTConfig.from_dict(config.to_dict()) == config
    assert isinstance(config.to_dict()["targets"], list)
    with pytest.raises(ConfigError) as error:
        OFTConfig.from_dict({"rank": 4})
    assert_one_sentence(error, "rank", "block_size")
