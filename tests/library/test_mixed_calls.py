"""Whose a row of a mixed batch is: texts read together or one by one, calls of other pipelines, compiled models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    IFPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    PRXPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from oft_diffusion import OFTConfig, inject_oft, load_oft_weights, oft_adapters_per_image, set_oft_adapters
from oft_diffusion.errors import AdapterError
from oft_diffusion.pipeline.counting import count_images
from tests.library.support import assert_one_sentence, copy_pipe, distance, excite

PROMPTS = ["a photo of dog", "a red mug on table", "a mug in room", "a dog"]
MOVED = 1e-3


class NegativesAndPrompts(StableDiffusionPipeline):  # type: ignore[misc]
    """Reads negative prompts and prompts in one call of the text encoder, by PRX's own code."""

    _encode_prompt_standard = PRXPipeline._encode_prompt_standard

    def _tokenize_prompts(self, prompts: list[str], device: Any, **_: Any) -> tuple[Tensor, Tensor]:
        longest = self.tokenizer.model_max_length
        read = self.tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        return read.input_ids, read.attention_mask.bool()

    def encode_prompt(
        self, prompt: Any, device: Any, each: int, guided: bool, negative: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        texts, _, negatives, _ = self._encode_prompt_standard(prompt, device, guided, negative or "")
        return tuple(t if t is None else t.repeat_interleave(each, 0) for t in (texts, negatives))  # type: ignore[return-value]


class PromptByPrompt(StableDiffusionPipeline):  # type: ignore[misc]
    """Reads one prompt after the other, as Ernie-Image does."""

    def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        apart = [super(PromptByPrompt, self).encode_prompt(one, *args, **kwargs) for one in prompt]
        texts, negatives = zip(*apart, strict=True)
        return torch.cat(texts), torch.cat(negatives)


class Layered(StableDiffusionPipeline):  # type: ignore[misc]
    """A pipeline whose call does not say of how many pictures it is."""

    def __call__(self, scenes: Sequence[str]) -> Any:
        return super().__call__(list(scenes), num_inference_steps=1)


def as_pipe(kind: type[StableDiffusionPipeline], pipe: Any) -> Any:
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    made = kind(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def pictures(pipe: Any, prompts: int = 2, each: int = 1, **options: Any) -> Tensor:
    call = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 5.0, "height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    call |= {"num_images_per_prompt": each, **options}
    images: Tensor = pipe(PROMPTS[:prompts], generator=generator, **call).images
    return images


def assert_each_is_its_own(pipe: Any, names: Sequence[str | None], *args: Any, **options: Any) -> None:
    runs = {}
    for name in {*names, None}:
        set_oft_adapters(pipe, [name] if name else [])
        runs[name] = pictures(pipe, *args, **options)
    set_oft_adapters(pipe, [])
    with oft_adapters_per_image(pipe, names):
        mixed = pictures(pipe, *args, **options)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], runs[name][i], rtol=0, atol=2e-5)
        assert all(distance(mixed[i], runs[other][i]) > MOVED for other in runs if other != name), (i, name)


def refused(pipe: Any, names: Sequence[str | None], words: str, *args: Any, **options: Any) -> None:
    with oft_adapters_per_image(pipe, names), pytest.raises(AdapterError) as error:
        pictures(pipe, *args, **options)
    assert_one_sentence(error, words)


@pytest.fixture
def both(pipe: Any, mug: Path, plain: Path) -> Any:
    """Both adapt the UNet and the text encoder."""
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, plain, adapter_name="plain")
    return pipe


def test_negatives_and_prompts_in_one_call_of_the_text_encoder(both: Any) -> None:
    prx = as_pipe(NegativesAndPrompts, both)
    assert_each_is_its_own(prx, ["mug", "plain", None, "mug"], 4)
    assert_each_is_its_own(prx, ["mug"] * 3 + ["plain"] * 3, 2, 3)
    assert_each_is_its_own(prx, ["mug", "mug", "plain", "plain"], 2, 2, guidance_scale=1.0)
    assert_each_is_its_own(prx, ["mug"] * 4, 2, 2)
    # Four texts may be [n0, n1, p0, p1], or one for each of four images.
    refused(prx, ["mug", "mug", "plain", "plain"], "reads 4 texts at once for 2 prompts with 2 images each", 2, 2)
    refused(prx, ["mug", None], "2 images with different adapters", 1, 2)
    refused(prx, ["mug", "plain", "mug", "plain"], "2 images with different adapters", 2, 2)


def test_one_text_after_the_other(both: Any, style: Path) -> None:
    ernie = as_pipe(PromptByPrompt, both)
    assert_each_is_its_own(ernie, ["mug", "mug"])
    assert_each_is_its_own(ernie, ["mug", "mug"], 1, 2)
    refused(ernie, ["mug", "plain"], "reads 1 texts at once while the call has 2 prompts")
    load_oft_weights(ernie, style, adapter_name="style")
    assert_each_is_its_own(ernie, ["style", None])
    assert_each_is_its_own(ernie, ["style", None], 1, 2)


def test_pipelines_that_share_the_components(both: Any) -> None:
    sibling = StableDiffusionPipeline.from_pipe(both)
    sibling.set_progress_bar_config(disable=True)
    img2img = StableDiffusionImg2ImgPipeline.from_pipe(both)
    img2img.set_progress_bar_config(disable=True)
    with oft_adapters_per_image(both, ["mug", "plain"]):
        for prompts in (1, 2):
            with pytest.raises(AdapterError) as error:
                pictures(sibling, prompts)
            assert_one_sentence(error, "not by the pipeline of this block")
        with pytest.raises(AdapterError, match="not by the pipeline of this block"):
            both.unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 1, both.unet.config.cross_attention_dim))
        pictures(both)
        with pytest.raises(AdapterError, match="runs outside its component's forward"):
            both.text_encoder.encoder.layers[0].self_attn.q_proj(torch.zeros(2, 32))
    assert_each_is_its_own(sibling, ["mug", "plain"])
    with oft_adapters_per_image(img2img, ["mug", "plain"]):
        drawn = {"image": torch.zeros(1, 3, 16, 16), "num_inference_steps": 2, "output_type": "latent"}
        assert len(img2img(PROMPTS[:2], **drawn).images) == 2
        with pytest.raises(AdapterError, match="makes 1 images while 2"):
            img2img(PROMPTS[:1], **drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "fullgraph"),
    [
        pytest.param("wrapped", False, marks=pytest.mark.slow),
        ("in place", True),
        pytest.param("repeated blocks", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_models_have_one_graph_for_all_names(both: Any, style: Path, how: str, fullgraph: bool) -> None:
    load_oft_weights(both, style, adapter_name="style")
    choices = [[a, b, c] for a, b, c in permutations(["mug", "plain", "style", None], 3)][::2]

    def mixed(names: list[Any]) -> Tensor:
        with oft_adapters_per_image(both, names):
            return pictures(both, 3)

    set_oft_adapters(both, ["style"])  # the text encoder is the base
    one, many = pictures(both, 3), [mixed(names) for names in choices]
    assert all(distance(a, b) > MOVED for a, b in combinations(many, 2))
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    other = torch.nn.Linear(2, 2)
    others = CompileCounterWithBackend("eager")
    compiled = torch.compile(other, backend=others)
    compiled(torch.zeros(1, 2))
    for part in ("unet", "text_encoder"):
        if how == "wrapped":
            setattr(both, part, torch.compile(getattr(both, part), backend=backend, fullgraph=fullgraph))
        elif how == "in place":
            getattr(both, part).compile(backend=backend, fullgraph=fullgraph)
    if how == "repeated blocks":
        both.unet.compile_repeated_blocks(backend=backend, fullgraph=fullgraph)
    counts = []
    for _ in range(2):
        torch.testing.assert_close(pictures(both, 3), one, rtol=0, atol=2e-5)
        torch.testing.assert_close(mixed(choices[0]), many[0], rtol=0, atol=2e-5)
        counts.append(backend.frame_count)
    assert counts[0] == counts[1] > 0
    for names, wanted in zip(choices, many, strict=True):  # more than dynamo's limit of graphs for one function
        torch.testing.assert_close(mixed(names), wanted, rtol=0, atol=2e-5)
    assert backend.frame_count == counts[0]
    compiled(torch.zeros(1, 2))
    assert others.frame_count == 1
    torch.compiler.reset()


def test_the_pipeline_is_itself_before_during_and_after(both: Any) -> None:
    kind = type(both)
    with oft_adapters_per_image(both, ["mug"]):
        assert isinstance(both, kind)
        assert type(both).__name__ == kind.__name__
        copy = copy_pipe(both)
        with pytest.raises(TypeError, match="multiple values"):
            both(PROMPTS[0], prompt=PROMPTS[1])
    assert type(both) is kind
    pictures(copy)


def test_a_call_that_does_not_say_how_many_images_it_makes(both: Any) -> None:
    layered = as_pipe(Layered, both)
    with oft_adapters_per_image(layered, ["mug", "plain"]), pytest.raises(AdapterError) as error:
        layered(PROMPTS[:2])
    assert_one_sentence(error, "how many images", "Layered")


def test_a_pipeline_without_prepare_latents() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        out_channels=6,
        in_channels=3,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()
    adapt(unet)
    scheduler = DDPMScheduler(variance_type="learned_range")
    pipe = IFPipeline(None, None, unet, scheduler, None, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert not hasattr(pipe, "prepare_latents")
    texts = torch.randn(2, 4, 32)

    def draw(prompts: int, each: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn: Tensor = pipe(
            prompt_embeds=texts[:prompts],
            negative_prompt_embeds=-texts[:prompts],
            num_images_per_prompt=each,
            num_inference_steps=2,
            output_type="pt",
            generator=generator,
        ).images
        return drawn

    for prompts, each in ((2, 1), (1, 2)):
        runs = {}
        for name in ("a", "b"):
            set_oft_adapters(pipe, name)
            runs[name] = draw(prompts, each)
        with oft_adapters_per_image(pipe, ["a", "b"]):
            mixed = draw(prompts, each)
        assert distance(mixed, torch.stack([runs["a"][0], runs["b"][1]])) < 2e-5
        assert distance(mixed, runs["a"]) > MOVED
    with oft_adapters_per_image(pipe, ["a", "b"]), pytest.raises(AdapterError) as error:
        draw(1)  # whose two rows are one image's
    assert_one_sentence(error, "makes 1 images while 2 have")


def test_a_prior_that_draws_negative_prompts_beside_the_prompts(pipe: Any) -> None:
    torch.manual_seed(0)
    longest = pipe.tokenizer.model_max_length
    prior = PriorTransformer(2, 8, num_layers=1, embedding_dim=32, num_embeddings=longest).eval()
    prior.clip_std.data.fill_(1.0)  # else all that it answers is 0
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=longest,
    )
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    encoder = CLIPTextModelWithProjection(text).eval()
    kandinsky = KandinskyV22PriorPipeline(prior, None, encoder, pipe.tokenizer, scheduler, None)
    kandinsky.set_progress_bar_config(disable=True)
    adapt(prior)

    def draw(each: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "generator": generator, "num_images_per_prompt": each}
        drawn: Tensor = kandinsky(PROMPTS[:2], negative_prompt=["red", "blue"], **options).image_embeds
        return drawn

    runs = {}
    for name in ("a", "b"):
        set_oft_adapters(kandinsky, name)
        runs[name] = draw(2)
    with oft_adapters_per_image(kandinsky, ["a", "b", "b", "a"]):
        mixed = draw(2)
        with pytest.raises(AdapterError, match="makes 2 images while 4"):
            draw(1)
    assert distance(runs["a"], runs["b"]) > MOVED
    wanted = [runs["a"][0], runs["b"][1], runs["b"][2], runs["a"][3]]
    torch.testing.assert_close(mixed, torch.stack(wanted), rtol=0, atol=2e-5)


def adapt(model: Any) -> None:
    for seed, name in enumerate(("a", "b")):
        bank = inject_oft(model, OFTConfig(block_size=8), name)
        excite(bank, name, seed=seed)
        bank.freeze(name)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"prompt": "a dog"}, (1, 1)),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 3}, (2, 6)),
        ({"prompt": ["a", "b"], "num_videos_per_prompt": 3, "image": [1, 2, 3]}, (2, 6)),
        ({"prompt": {0: "a", 8: "b"}}, (1, 1)),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 3, 4), "num_images_per_prompt": None}, (2, 2)),
        ({"prompt": None, "prompt_embeds": [torch.zeros(3, 4)] * 2, "num_waveforms_per_prompt": 2}, (2, 4)),
        ({"prompt": "a", "image_embeddings": torch.zeros(4, 1, 1)}, (1, 4)),
        ({"image_embeds": torch.zeros(2, 8), "num_images_per_prompt": 2}, (2, 4)),
        ({"class_labels": [1, 2]}, (2, 2)),
        ({"batch_size": 3}, (3, 3)),
        ({"image": torch.zeros(2, 3, 8, 8)}, (2, 2)),
        ({"image": object()}, (1, 1)),
        ({"image": [[1, 2], [3]]}, (None, None)),
        ({"prompt": None, "image": torch.zeros(2, 3, 8, 8)}, (None, None)),
        ({"video": torch.zeros(2, 3, 8, 8)}, (None, None)),
    ],
)
def test_counting(arguments: dict[str, Any], wanted: tuple[int | None, int | None]) -> None:
    assert count_images(arguments) == wanted
