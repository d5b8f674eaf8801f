"""Which layers a set leaves out because they could not learn, and what stands in for a missing row."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.targets import architecture_of, find_layers, find_targets
from oft_diffusion.text_encoders import HIDDEN_STATES, last_hidden_state
from tests.helpers import tiny_denoisers as tiny
from tests.library.support import excite, tiny_unet


@pytest.mark.parametrize(
    "build", [tiny.sd3, tiny.qwen_image, tiny.mochi, tiny.easy_animate, tiny.hunyuan_video_15, tiny.joy_image]
)
def test_what_is_left_out_of_the_last_block_could_not_learn_and_all_else_can(
    build: Callable[[], tuple[Any, dict[str, Any]]],
) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    row = architecture_of(model)
    assert row is not None
    targets = {t.name for t in find_targets(model, "all-linear")}
    with_idle = {t.name for t in find_targets(model, row.pattern("all-linear"))}
    assert targets < with_idle
    bank = inject_oft(model, OFTConfig(block_size=8), layers=with_idle)
    excite(bank)
    for parameter in model.parameters():  # zeros at initialisation would hide what matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    model(**inputs, return_dict=False)[0].square().sum().backward()
    gradient = bank.generators["default"].grad
    assert gradient is not None
    learning = {name for name, rows in bank.layer_slices("default").items() if gradient[rows].abs().max() > 0}
    assert learning == targets


@pytest.mark.parametrize(
    ("pipeline", "component", "clip_skip", "state"),
    [
        ("StableDiffusionPipeline", "text_encoder", 0, -1),
        ("StableDiffusionPipeline", "text_encoder", 1, -2),
        ("StableDiffusionXLPipeline", "text_encoder", 0, -2),
        ("StableDiffusionXLImg2ImgPipeline", "text_encoder", 1, -3),
        ("StableDiffusionXLPipeline", "text_encoder_2", 1, -1),  # its pooled output comes from the last layer
        ("StableDiffusion3Pipeline", "text_encoder", 0, -1),
        ("StableDiffusion3Pipeline", "text_encoder_3", 0, -1),
        ("FluxPipeline", "text_encoder", 0, -1),
        ("Flux2Pipeline", "text_encoder", 0, 30),
        ("Flux2KleinPipeline", "text_encoder", 0, 27),
        ("ZImagePipeline", "text_encoder", 0, -2),
        ("SomebodysPipeline", "text_encoder", 0, -1),
    ],
)
def test_which_hidden_state_a_pipeline_takes(pipeline: str, component: str, clip_skip: int, state: int) -> None:
    assert last_hidden_state(pipeline, component, clip_skip) == state


def test_every_row_of_hidden_states_is_about_a_pipeline_that_there_is() -> None:
    pipelines = [name for name in dir(diffusers) if "Pipeline" in name]
    for prefix, states in HIDDEN_STATES.items():
        of_row = [p for p in pipelines if p.startswith(prefix) and row_of(p) == prefix]
        assert of_row, prefix
        for component in states:
            assert any(component in inspect.signature(getattr(diffusers, p)).parameters for p in of_row), prefix


def row_of(pipeline: str) -> str:
    return max((prefix for prefix in HIDDEN_STATES if pipeline.startswith(prefix)), key=len)


@pytest.mark.parametrize(("hidden_state", "layers"), [(-1, 4), (-2, 3), (-4, 1), (3, 3), (1, 1), (4, 4)])
@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_layers_behind_the_hidden_state_that_is_taken_are_left_out(kind: str, hidden_state: int, layers: int) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
    }
    model: Any
    if kind == "clip":
        model = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=20, max_position_embeddings=8))
    else:
        model = LlamaModel(LlamaConfig(**sizes, vocab_size=20))
    found = find_targets(model, "attention", hidden_state=hidden_state)
    assert len(found) == 4 * layers
    bank = inject_oft(model, OFTConfig(block_size=8), layers=[t.name for t in found])
    excite(bank)
    states = model(torch.arange(6)[None], output_hidden_states=True).hidden_states
    states[hidden_state].square().sum().backward()
    gradient = bank.generators["default"].grad
    assert gradient is not None
    assert all(gradient[rows].abs().max() > 0 for rows in bank.layer_slices("default").values())


class Unheard(nn.Module):
    """An architecture of nobody's table."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedder = nn.Sequential(nn.Linear(16, 16))
        self.token_refiner = nn.ModuleList([_Block()])
        self.stages = nn.ModuleList([_Block(), _Block()])
        self.proj_out = nn.Linear(16, 16)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(16, 16)})
        self.self_attn = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("to_q", "to_k", "to_v")})
        self.self_attn["to_out"] = nn.ModuleList([nn.Linear(16, 16)])
        self.mlp = nn.ModuleDict({"up": nn.Linear(16, 16), "down": nn.Linear(16, 16)})
        self.skip = nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("target_set", "layers"),
    [
        ("attention", r"self_attn\.(to_q|to_k|to_v|to_out\.0)"),
        ("attention+mlp", r"self_attn\.(to_q|to_k|to_v|to_out\.0)|mlp\.(up|down)"),
        ("all-linear", r"self_attn\.(to_q|to_k|to_v|to_out\.0)|mlp\.(up|down)|skip"),
    ],
)
def test_an_unknown_architecture_is_adapted_by_names_and_says_so(target_set: str, layers: str) -> None:
    model = Unheard()
    with pytest.warns(UserWarning, match=r"^Unheard has no row .* such as stages\.0\.") as told:
        found = find_targets(model, target_set)
    assert len(told) == 1
    pattern = re.compile(rf"stages\.\d\.({layers})")
    assert [t.name for t in found] == [n for n, _ in model.named_modules() if pattern.fullmatch(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_targets(model, r"stages\.0\.skip")) == 1  # a pattern of one's own needs no row
        assert len(find_layers(model, ["proj_out"])) == 1


def test_a_subclass_has_the_row_of_its_parent() -> None:
    unet = tiny_unet()
    before = [t.name for t in find_targets(unet, "attention")]
    unet.__class__ = type("FSDPUNet2DConditionModel", (type(unet),), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [t.name for t in find_targets(unet, "attention")] == before
