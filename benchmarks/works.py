"""What the methods are measured on: denoisers of real configurations and random weights, with inputs for one step.

`small=True` is for processors: it cuts latents, text and depth, of SD 1.5, which has little of that, the widths; and
`Work.note` says what was cut. The stack of linear layers is there for scaling alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from oft_diffusion.targets import find_targets

TEXT_LENGTH = 77
T5_LENGTH = {"SD 3.5 Medium": 256, "Flux.1": 512}
Condition = Callable[[Sequence[Any], Tensor, dict[str, Tensor]], dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """What a setup may choose: of a denoiser the batch, of the stack all."""

    batch: int = 1
    tokens: int = 256
    width: int = 640
    layers: int = 8


class Work(nn.Module):
    """A denoiser, maybe its text encoders, and what goes into them.

    Attributes:
        inputs: arguments of the denoiser.
        condition: arguments from the text encoders' outputs, in place of those in `inputs`; not called without any.
        note: what was cut, empty where nothing was.
        inner: its few blocks stand for inner ones, and every method's gradients flow back to the inputs. First layers,
            whose inputs' gradients some methods need not have, would else count for far more than in the whole.
    """

    denoiser: Any
    encoders: Any

    def __init__(
        self,
        denoiser: Any,
        inputs: dict[str, Any],
        encoders: Sequence[nn.Module] = (),
        condition: Condition | None = None,
        note: str = "",
        *,
        inner: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser, self.encoders = denoiser, nn.ModuleList(encoders)
        self.inputs, self.condition, self.note, self.inner = inputs, condition, note, inner
        self.tokens = _tokens(inputs) if self.encoders else None

    def forward(self) -> Tensor:
        inputs = dict(self.inputs)
        if self.condition is not None and self.encoders:
            assert self.tokens is not None
            inputs |= self.condition(list(self.encoders), self.tokens, self.inputs)
        result = self.denoiser(**inputs)
        return result if isinstance(result, Tensor) else result[0]

    def components(self) -> list[nn.Module]:
        """What is adapted: the denoiser, then the text encoders."""
        return [self.denoiser, *self.encoders]

    def targets(self) -> list[list[str]]:
        """Target layers of each component."""
        names = ["attention" if hasattr(self.denoiser, "config") else r"\d+", *("attention" for _ in self.encoders)]
        hidden = [-1, *(encoder.taken for encoder in self.encoders)]
        parts = zip(self.components(), names, hidden, strict=True)
        return [[t.name for t in find_targets(part, name, hidden_state=last)] for part, name, last in parts]

    def let_gradients_through(self) -> None:
        """Have gradients flow back to the inputs, as below an adapter; where there is text, to its embeddings."""
        self.inputs = {
            key: value.detach().clone().requires_grad_() if _is_activation(value) else value
            for key, value in self.inputs.items()
        }
        for encoder in self.encoders:
            encoder.enable_input_require_grads()

    def copy(self, own: Collection[int] | None = ()) -> Work:
        """A model of its own modules upon the same weights, so that methods do not need the memory of one each.

        Args:
            own: ids of parameters that the copy is to have for itself; None for all.
        """
        shared = [*self.buffers(), *(p for p in self.parameters() if own is not None and id(p) not in own)]
        shared += [value for value in (*self.inputs.values(), self.tokens) if isinstance(value, Tensor)]
        return copy.deepcopy(self, {id(tensor): tensor for tensor in shared})

    def checkpoint(self) -> None:
        """Recompute blocks in backward."""
        self.denoiser.enable_gradient_checkpointing()
        for encoder in self.encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def compile(self, *arguments: Any, **settings: Any) -> None:
        """Compile the denoiser's repeated blocks, each kind once; text encoders stay as they are."""
        kinds = getattr(self.denoiser, "_repeated_blocks", None) or self.denoiser._no_split_modules
        for module in self.denoiser.modules():
            if type(module).__name__ in kinds:
                module.compile(*arguments, **settings)


def sd15(sizes: Sizes, *, text: bool = False, small: bool = False) -> Work:
    """Stable Diffusion 1.5 at 512 x 512; small: a fifth as wide, at 256 x 256."""
    shape: dict[str, Any] = {"block_out_channels": (64, 128, 256, 256), "sample_size": 32} if small else {}
    unet = UNet2DConditionModel(**{"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, **shape})
    inputs = _unet_inputs(unet, sizes.batch, unet.config.sample_size)
    note = "channels 64, 128, 256, 256 of 320, 640, 1280, 1280; 32x32 latents" if small else ""
    return Work(unet, inputs, [clip_l(-1)] if text else [], _last_hidden, note)


def sdxl(sizes: Sizes, *, text: bool = False, small: bool = False) -> Work:
    """SDXL at 1024 x 1024; small: fewer transformers, at 256 x 256."""
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1 if small else 2,
        transformer_layers_per_block=(1, 1, 2) if small else (1, 2, 10), attention_head_dim=(5, 10, 20),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    inputs = _unet_inputs(unet, sizes.batch, 32 if small else 128)
    inputs["added_cond_kwargs"] = {
        "text_embeds": torch.randn(sizes.batch, 1280),
        "time_ids": torch.ones(sizes.batch, 6),
    }
    note = "1 of 2 layers a block, 1 and 2 of 2 and 10 transformers a layer; 32x32 latents" if small else ""
    return Work(unet, inputs, [clip_l(-2), clip_g(-2)] if text else [], _sdxl_condition, note)


def sd35(sizes: Sizes, *, text: bool = False, small: bool = False) -> Work:
    """Stable Diffusion 3.5 Medium at 1024 x 1024; small: two blocks, at 256 x 256. T5's hidden states are given."""
    depth, side, t5 = (2, 32, TEXT_LENGTH) if small else (24, 128, T5_LENGTH["SD 3.5 Medium"])
    transformer = SD3Transformer2DModel(
        sample_size=128, num_layers=depth, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, in_channels=16, out_channels=16, qk_norm="rms_norm",
        pos_embed_max_size=384, dual_attention_layers=tuple(range(1 if small else 13)),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(sizes.batch, 16, side, side),
        "encoder_hidden_states": torch.randn(sizes.batch, TEXT_LENGTH + t5, 4096),
        "pooled_projections": torch.randn(sizes.batch, 2048),
        "timestep": torch.full((sizes.batch,), 500.0),
    }
    encoders = [clip_l(-2, projection=True), clip_g(-2)] if text else []
    note = "2 of 24 blocks, as inner ones; 32x32 latents, 154 tokens of text" if small else ""
    return Work(transformer, inputs, encoders, _sd3_condition, note, inner=small)


def flux(sizes: Sizes, *, text: bool = False, small: bool = False) -> Work:
    """Flux.1 dev at 1024 x 1024; small: one block of each kind, at 256 x 256. T5's hidden states are given."""
    side = 16 if small else 64
    transformer = FluxTransformer2DModel(
        num_layers=1 if small else 19, num_single_layers=1 if small else 38, guidance_embeds=True
    )
    text_length = 64 if small else T5_LENGTH["Flux.1"]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(sizes.batch, side * side, 64),
        "encoder_hidden_states": torch.randn(sizes.batch, text_length, 4096),
        "pooled_projections": torch.randn(sizes.batch, 768),
        "timestep": torch.full((sizes.batch,), 0.5),
        "guidance": torch.full((sizes.batch,), 3.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text_length, 3),
    }
    note = "1 of 19 double and 1 of 38 single blocks, as inner ones; 32x32 latents, 64 tokens of text" if small else ""
    return Work(transformer, inputs, [clip_l(-1)] if text else [], _pooled, note, inner=small)


class Stack(nn.Sequential):
    """Linear layers one behind another, as narrow a thing as an adapter can sit on."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Sequential names it
        return super().forward(input)


def stack(sizes: Sizes, *, text: bool = False, small: bool = False) -> Work:
    """Linear layers, all of them targets: the adapter alone, to see it scale."""
    return Work(Stack(sizes.layers, sizes.width), {"input": torch.randn(sizes.batch, sizes.tokens, sizes.width)})


WORKS: dict[str, Callable[..., Work]] = {
    "SD 1.5": sd15,
    "SDXL": sdxl,
    "SD 3.5 Medium": sd35,
    "Flux.1": flux,
    "stack of linear layers": stack,
}


# -- text encoders -----------------------------------------------------------------------------------------------------


def clip_l(taken: int, *, projection: bool = False) -> Any:
    """OpenAI's ViT-L/14."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return _taken((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), taken)


def clip_g(taken: int) -> Any:
    """OpenCLIP's ViT-bigG/14."""
    config = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        hidden_act="gelu",
    )  # fmt: skip
    return _taken(CLIPTextModelWithProjection(config), taken)


def _taken(encoder: Any, hidden_state: int) -> Any:
    """Note which hidden state the pipeline takes. With a projection it takes the pooled output, too: of all layers."""
    encoder.taken = -1 if isinstance(encoder, CLIPTextModelWithProjection) else hidden_state
    return encoder


def _tokens(inputs: dict[str, Any]) -> Tensor:
    batch = next(value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1).shape[0]
    tokens = torch.randint(1000, 40000, (batch, TEXT_LENGTH))
    tokens[:, -1] = 49407  # the end, at which outputs are pooled
    return tokens


def _last_hidden(encoders: Sequence[Any], tokens: Tensor, given: dict[str, Tensor]) -> dict[str, Any]:
    return {"encoder_hidden_states": encoders[0](tokens)[0]}


def _pooled(encoders: Sequence[Any], tokens: Tensor, given: dict[str, Tensor]) -> dict[str, Any]:
    return {"pooled_projections": encoders[0](tokens).pooler_output}


def _two(encoders: Sequence[Any], tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The last hidden states but one, side by side, and the projections where there are any."""
    found = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    return torch.cat([f.hidden_states[-2] for f in found], dim=-1), [f.text_embeds for f in found if "text_embeds" in f]


def _sdxl_condition(encoders: Sequence[Any], tokens: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    hidden, [pooled] = _two(encoders, tokens)
    return {
        "encoder_hidden_states": hidden,
        "added_cond_kwargs": {**given["added_cond_kwargs"], "text_embeds": pooled},
    }


def _sd3_condition(encoders: Sequence[Any], tokens: Tensor, given: dict[str, Tensor]) -> dict[str, Any]:
    hidden, pooled = _two(encoders, tokens)
    states = given["encoder_hidden_states"]
    wide = nn.functional.pad(hidden, (0, states.shape[-1] - hidden.shape[-1]))
    return {
        "encoder_hidden_states": torch.cat([wide.to(states.dtype), states[:, TEXT_LENGTH:]], dim=1),
        "pooled_projections": torch.cat(pooled, dim=-1),
    }


def _unet_inputs(unet: Any, batch: int, side: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, side, side),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, unet.config.cross_attention_dim),
        "timestep": torch.full((batch,), 500),
    }


def _is_activation(value: object) -> bool:
    """Latents and hidden states: of three axes at least."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 3
