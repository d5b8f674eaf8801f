"""Injection: the identity at the start, the dense reference, gradients, and a base that nothing ever touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from oft_diffusion import OFTConfig, inject_oft, load_oft_state_dict, oft_state_dict, remove_oft
from oft_diffusion.inject import require_bank
from oft_diffusion.rotation import packed_size
from tests.core.reference import SEEDS, dense_rotation, relative, two_layers, unet_inputs
from tests.library.support import excite, folder_bytes, tiny_unet

EVERYTHING = OFTConfig(block_size=8, targets=".*")


def out_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(**unet_inputs(model, seed)).sample


def tiny_clip(projection: bool = False) -> Any:
    torch.manual_seed(0)
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=12, bos_token_id=1, eos_token_id=2, projection_dim=16,
        )
    ).eval()  # fmt: skip


@given(
    seed=SEEDS, block_size=st.sampled_from([2, 4, 8, 16]), parametrisation=st.sampled_from(["cayley", "cayley_neumann"])
)
def test_a_new_adapter_is_the_identity_bit_by_bit_and_an_excited_one_is_not(
    seed: int, block_size: int, parametrisation: Any
) -> None:
    unet = tiny_unet(seed % 7)
    before = out_of(unet)
    bank = inject_oft(unet, OFTConfig(block_size=block_size, parametrisation=parametrisation))
    assert torch.equal(out_of(unet), before)
    excite(bank, seed=seed)
    assert relative(out_of(unet), before) > 1e-2


@given(seed=SEEDS, block_size=st.sampled_from([2, 3, 4, 8]), norm=st.sampled_from([0.1, 0.5, 2.0]))
def test_live_is_the_dense_reference_that_builds_w_r_transposed(seed: int, block_size: int, norm: float) -> None:
    model = two_layers(seed % 5).double()
    bank = inject_oft(model, OFTConfig(block_size=block_size, targets=".*"))
    excite(bank, seed=seed, norm=norm)
    x = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    dense = copy.deepcopy(model)
    remove_oft(dense)
    base = dense(x)
    for name in ("0", "2"):
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data = layer.weight.data @ dense_rotation(bank, name).T
    # The generators are float32, and so are the deltas that are built of them.
    assert relative(model(x), dense(x)) < 1e-5
    assert relative(dense(x), base) > 0.01


@given(seed=SEEDS, block_size=st.sampled_from([2, 4, 8]))
def test_gradients_of_the_generators_and_the_input_against_the_dense_reference(seed: int, block_size: int) -> None:
    model = two_layers(seed % 5).double()
    bank = inject_oft(model, OFTConfig(block_size=block_size, targets=".*"))
    excite(bank, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 24, dtype=torch.float64, generator=draw)
    weight = torch.randn(6, 10, dtype=torch.float64, generator=draw)
    ours = x.clone().requires_grad_()
    (model(ours) * weight).sum().backward()

    packed = bank.generators["default"].detach().double().requires_grad_()
    theirs, h = x.clone().requires_grad_(), None
    for name, rows in bank.layer_slices("default").items():
        q = _skew(packed[rows], block_size)
        identity = torch.eye(block_size, dtype=torch.float64)
        r = torch.block_diag(*((identity + q) @ torch.linalg.inv(identity - q)))
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        h = (theirs if h is None else h.relu()) @ (layer.weight.detach() @ r.T).T + layer.bias.detach()
    assert h is not None
    (h * weight).sum().backward()
    gradient = bank.generators["default"].grad
    assert gradient is not None
    assert packed.grad is not None
    assert ours.grad is not None
    assert theirs.grad is not None
    assert gradient.dtype == torch.float32
    assert relative(gradient, packed.grad) < 1e-5
    assert relative(ours.grad, theirs.grad) < 1e-5


def _skew(packed: torch.Tensor, size: int) -> torch.Tensor:
    rows = []
    for block in packed:
        q, k = [[torch.zeros((), dtype=packed.dtype)] * size for _ in range(size)], 0
        for i in range(size):
            for j in range(i + 1, size):
                q[i][j], q[j][i] = block[k], -block[k]
                k += 1
        rows.append(torch.stack([torch.stack(row) for row in q]))
    return torch.stack(rows)


def test_only_the_bank_trains_and_float32_it_stays() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    assert not any(p.requires_grad for p in unet.parameters())
    assert [p.requires_grad for p in bank.parameters()] == [True]
    excite(bank)
    unet.to(torch.bfloat16)
    bank.to(torch.bfloat16)
    assert bank.generators["default"].dtype == torch.float32
    with torch.no_grad():
        out = unet(**unet_inputs(unet, dtype=torch.bfloat16)).sample
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# Nothing of the base changes


def test_names_state_dict_and_saved_files_are_those_of_the_base(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "before")
    names = [(n, type(m)) for n, m in unet.named_modules()]
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    excite(inject_oft(unet, OFTConfig(block_size=8, targets="all-linear")))
    out_of(unet)
    assert [(n, type(m)) for n, m in unet.named_modules()] == names
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    unet.save_pretrained(tmp_path / "injected")
    assert folder_bytes(tmp_path / "injected") == folder_bytes(tmp_path / "before")


def test_removal_is_bit_exact_and_leaves_no_hook() -> None:
    unet = tiny_unet()
    unet.conv_in.requires_grad_(False)
    trainable = [n for n, p in unet.named_parameters() if p.requires_grad]
    before, attributes = out_of(unet), {n: sorted(m.__dict__) for n, m in unet.named_modules()}
    excite(inject_oft(unet, OFTConfig(block_size=8)))
    excite(inject_oft(unet, OFTConfig(block_size=4, targets="attention+mlp"), "b"), "b", seed=1)
    assert relative(out_of(unet), before) > 1e-2
    remove_oft(unet)
    assert torch.equal(out_of(unet), before)
    assert {n: sorted(m.__dict__) for n, m in unet.named_modules()} == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unet.modules())
    assert [n for n, p in unet.named_parameters() if p.requires_grad] == trainable
    with pytest.raises(ValueError, match="has no OFT adapter"):
        require_bank(unet)


def test_removing_one_of_two_leaves_the_other_alone() -> None:
    unet = tiny_unet()
    excite(inject_oft(unet, OFTConfig(block_size=8), "a"), "a")
    only_a = out_of(unet)
    excite(inject_oft(unet, OFTConfig(block_size=8), "b"), "b", seed=1)
    assert relative(out_of(unet), only_a) > 1e-2
    remove_oft(unet, "b")
    assert torch.equal(out_of(unet), only_a)


@given(seed=SEEDS)
def test_a_state_dict_goes_round(seed: int) -> None:
    first, second = tiny_unet(), tiny_unet()
    config = OFTConfig(block_size=8, scaled=bool(seed % 2))
    base = out_of(first)
    excite(inject_oft(first, config), seed=seed)
    state = oft_state_dict(first)
    assert all(t.dtype == torch.float32 and t.shape[1] == packed_size(8) for t in state.values())
    inject_oft(second, config)
    load_oft_state_dict(second, state)
    assert relative(out_of(second), out_of(first)) < 1e-6
    assert relative(out_of(first), base) > 1e-3
    assert all(torch.allclose(oft_state_dict(second)[k], v, rtol=1e-6) for k, v in state.items())


# Real architectures


def test_a_clip_text_encoder_with_and_without_projection() -> None:
    ids = torch.tensor([[1, 5, 6, 7, 2, 2]])
    for projection in (False, True):
        model = tiny_clip(projection)
        with torch.no_grad():
            before = model(ids)[0]
            bank = inject_oft(model, OFTConfig(block_size=8, targets="attention+mlp"))
            assert torch.equal(model(ids)[0], before)
            excite(bank)
            assert relative(model(ids)[0], before) > 1e-2
        assert len(bank.hooks) == 2 * 6


@pytest.mark.parametrize(
    ("target_set", "layers", "blocks", "parameters"),
    [("attention", 128, 3108, 1_541_568), ("attention+mlp", 160, 3108 + 1950, 5058 * 496)],
)
def test_the_layers_and_sizes_of_stable_diffusion_15(
    target_set: str, layers: int, blocks: int, parameters: int
) -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    bank = inject_oft(unet, OFTConfig(targets=target_set))
    assert len(bank.hooks) == layers
    assert sum(bank.adapters["default"].blocks.values()) == blocks
    assert sum(p.numel() for p in bank.parameters()) == parameters


# What differs in Stable Diffusion 2.x: linear proj_in and proj_out, heads of 64 channels, 1024-wide OpenCLIP ViT-H text
# encoder of which 23 layers are kept.
@pytest.mark.parametrize(
    ("target_set", "unet_layers", "text_layers"),
    [("attention", 128, 92), ("attention+mlp", 160, 138), ("all-linear", 192, 138)],
)
def test_the_layers_of_stable_diffusion_2(target_set: str, unet_layers: int, text_layers: int) -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                hidden_act="gelu",
            )
        )  # fmt: skip
    config = OFTConfig(targets=target_set, block_size=32)
    assert len(inject_oft(unet, config).hooks) == unet_layers
    bank = inject_oft(encoder, config)
    assert len(bank.hooks) == text_layers
    per_layer = {"attention": 4 * 32, "attention+mlp": 4 * 32 + 32 + 128, "all-linear": 4 * 32 + 32 + 128}[target_set]
    assert sum(bank.adapters["default"].blocks.values()) == 23 * per_layer


def test_the_layers_and_sizes_of_clip_l() -> None:
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    bank = inject_oft(encoder)
    assert len(bank.hooks) == 48
    assert sum(p.numel() for p in bank.parameters()) == 48 * 24 * 496


def test_any_module_works_with_a_pattern() -> None:
    model = two_layers()
    x = torch.randn(3, 24)
    before = model(x)
    excite(inject_oft(model, EVERYTHING))
    assert relative(model(x), before) > 1e-2
