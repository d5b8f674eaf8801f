"""`TrainConfig`: the one list of training knobs. TOML, the command line, forms and metadata derive from it.

A `TrainConfig` may hold nonsense until someone asks: `checks.py` finds everything wrong with the settings alone, and
`preflight.py` adds what the disk and the model's configs say, so that a user reads all of it at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from oft_diffusion.config import OFTConfig, Parametrisation
from oft_diffusion.errors import ConfigError
from oft_diffusion.training import config_io, memory_presets
from oft_diffusion.training.noise import FlowWeighting, TimestepDensity

MixedPrecision = Literal["no", "fp16", "bf16"]
Quantization = Literal["nf4", "int8", "torchao-int8", "torchao-int4", "torchao-float8", "quanto-int8", "quanto-float8"]
PriorTarget = Literal["noise", "base"]
Schedule = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw8bit"]


def _about(group: str, about: str, **limits: Any) -> dict[str, Any]:
    """A knob's group, help text and limits: minimum, above (exclusive), maximum.

    `free`: a resume may change it. `blank`: texts in it may be empty.
    """
    return {"group": group, "about": about, **limits}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one DreamBooth run. `field.metadata` holds each knob's group, help text and bounds.

    Paths are strings, relative ones to the working directory. In prompts `{trigger}` and `{class_word}` are filled in.
    """

    model: str = field(
        metadata=_about(
            "base model",
            "folder in diffusers' format, one .safetensors checkpoint (with config_dir), a hub id, or, on the "
            "command line, pocket for the base that ships with this package",
            free=True,
        )
    )
    instance_dir: str = field(
        metadata=_about(
            "subject", "folder with 3 to 8 pictures of the subject; NAME.txt beside NAME.jpg is its caption", free=True
        )
    )
    trigger: str = field(metadata=_about("subject", "the rare word that will name the subject, for example sks"))
    class_word: str = field(metadata=_about("subject", "what kind of thing the subject is, for example dog"))
    output_dir: str = field(
        metadata=_about("output", "folder for the adapter, checkpoints, pictures and losses", free=True)
    )

    config_dir: str | None = field(
        default=None,
        metadata=_about(
            "base model", "for a single-file model: folder with the pipeline's configs and tokenizer", free=True
        ),
    )

    denoiser_file: str | None = field(
        default=None,
        metadata=_about("base model", "GGUF file with the denoiser's weights, in place of those in the model's folder"),
    )

    clip_skip: int | None = field(
        default=None,
        metadata=_about(
            "base model",
            "layers at the end of CLIP that are left out, as diffusers counts: 1 is what others call clip skip 2",
            minimum=1,
        ),
    )

    instance_prompt: str = field(
        default="a photo of {trigger} {class_word}", metadata=_about("subject", "prompt of pictures without a caption")
    )
    resolution: int = field(
        default=512,
        metadata=_about(
            "subject", "side of the square that pictures are resized and cropped to", minimum=16, maximum=4096
        ),
    )
    min_crop: float = field(
        default=1.0,
        metadata=_about(
            "subject",
            "smallest part of the square's side that a random crop keeps: each picture gets a few; 1 for none",
            above=0.0, maximum=1.0,
        ),
    )  # fmt: skip
    flip: bool = field(
        default=False,
        metadata=_about("subject", "mirror half of the pictures; not for subjects with lettering or a left side"),
    )

    prior_preservation: bool = field(
        default=False,
        metadata=_about("prior preservation", "train on class images too, so that the class word keeps its meaning"),
    )
    prior_weight: float = field(
        default=1.0, metadata=_about("prior preservation", "weight of the class images' loss", above=0.0)
    )
    prior_target: PriorTarget = field(
        default="noise",
        metadata=_about(
            "prior preservation",
            "what class images teach: their noise, or what the base itself answers, which keeps more at a forward more",
        ),
    )
    class_prompts: tuple[str, ...] = field(
        default=("a photo of {class_word}",),
        metadata=_about(
            "prior preservation", 'prompts of the class images, in turn; "" is no prompt, as guidance uses', blank=True
        ),
    )
    prior_twins: int = field(
        default=0,
        metadata=_about(
            "prior preservation",
            "class images that are the instance images under so many other prompts each: without the trigger, and with "
            "made-up words for it; needs prior_target base",
            minimum=0,
            maximum=64,
        ),
    )
    class_batch_size: int | None = field(
        default=None,
        metadata=_about(
            "prior preservation", "class images per forward and process; as many as instance images if None", minimum=1
        ),
    )
    class_dir: str | None = field(
        default=None,
        metadata=_about(
            "prior preservation",
            "folder of class images, made there if missing; default: class_images in output_dir",
            free=True,
        ),
    )
    num_class_images: int = field(
        default=100, metadata=_about("prior preservation", "how many class images to make", minimum=1)
    )

    block_size: int | Literal["auto"] = field(
        default=32, metadata=_about("adapter", "side of the rotation blocks, or auto")
    )
    targets: str | tuple[str, ...] = field(
        default="attention", metadata=_about("adapter", "layers to adapt: a target set's name, or regular expressions")
    )
    parametrisation: Parametrisation = field(
        default="cayley", metadata=_about("adapter", "exact rotation, or the truncated series")
    )
    neumann_order: int = field(default=5, metadata=_about("adapter", "highest power of Q in the series"))
    scaled: bool = field(
        default=False,
        metadata=_about("adapter", "divide generators by 2 sqrt(b - 1): one learning rate for all block sizes"),
    )
    coft_eps: float | None = field(
        default=None, metadata=_about("adapter", "constrained OFT: bound on each block's Frobenius norm")
    )
    share_qkv: bool = field(
        default=False, metadata=_about("adapter", "one generator for q, k and v that read the same input")
    )
    text_encoder: bool = field(
        default=False, metadata=_about("adapter", "adapt the text encoders too: the CLIPs, or where there is none, all")
    )
    init_adapter: str | None = field(default=None, metadata=_about("adapter", "continue from this adapter file"))

    optimizer: Optimizer = field(
        default="adamw",
        metadata=_about("optimisation", "AdamW, or bitsandbytes' with moments in 8 bits; needs oft-diffusion[quant]"),
    )
    learning_rate: float = field(
        default=1e-4, metadata=_about("optimisation", "peak learning rate of AdamW", above=0.0)
    )
    text_encoder_learning_rate: float | None = field(
        default=None,
        metadata=_about("optimisation", "the same for the text encoder; default: learning_rate", above=0.0),
    )
    steps: int = field(default=500, metadata=_about("optimisation", "optimizer steps", minimum=1, free=True))
    batch_size: int = field(
        default=1,
        metadata=_about("optimisation", "instance images per forward and process; class images come on top", minimum=1),
    )
    accumulation: int = field(default=1, metadata=_about("optimisation", "forwards per optimizer step", minimum=1))
    lr_schedule: Schedule = field(
        default="constant", metadata=_about("optimisation", "course of the learning rate after the warm-up")
    )
    warmup_steps: int = field(
        default=0, metadata=_about("optimisation", "steps over which the learning rate rises from zero", minimum=0)
    )
    decay_steps: int = field(
        default=0,
        metadata=_about(
            "optimisation", "steps at the end over which a constant learning rate falls to zero, as a cosine", minimum=0
        ),
    )
    weight_decay: float = field(
        default=0.0,
        metadata=_about("optimisation", "AdamW's decay; it pulls rotations back to the identity", minimum=0.0),
    )
    adam_epsilon: float = field(
        default=1e-8,
        metadata=_about(
            "optimisation",
            "AdamW's epsilon; above most gradients (3e-4 for the pocket base), what has none but noise stays put",
            above=0.0,
        ),
    )
    max_grad_norm: float = field(
        default=1.0, metadata=_about("optimisation", "gradients are clipped to this norm", above=0.0)
    )
    min_snr_gamma: float | None = field(
        default=None, metadata=_about("optimisation", "min-SNR loss weighting (arXiv 2303.09556), usually 5", above=0.0)
    )
    min_timestep: int = field(
        default=0, metadata=_about("optimisation", "lowest timestep that images are noised to", minimum=0)
    )
    max_timestep: int | None = field(
        default=None,
        metadata=_about(
            "optimisation",
            "timestep below which images are noised; the highest decide the composition. Default: all",
            minimum=1,
        ),
    )
    timestep_density: TimestepDensity | None = field(
        default=None,
        metadata=_about(
            "optimisation",
            "how noise levels are drawn (arXiv 2403.03206, section 3.1); default: logit-normal for flow models, "
            "uniform for the others",
        ),
    )
    logit_mean: float = field(
        default=0.0, metadata=_about("optimisation", "of logit-normal levels; above 0 for more noise")
    )
    logit_std: float = field(default=1.0, metadata=_about("optimisation", "of logit-normal levels", above=0.0))
    mode_scale: float = field(
        default=1.29, metadata=_about("optimisation", "of mode levels: how many lie in the middle", maximum=1.75)
    )
    timestep_shift: float | None = field(
        default=None,
        metadata=_about(
            "optimisation",
            "flow models: factor by which noise levels are shifted towards noise, 1 for none; default: as the base's "
            "scheduler shifts them, by the resolution where it does so",
            above=0.0,
        ),
    )
    flow_weighting: FlowWeighting = field(
        default="none", metadata=_about("optimisation", "flow models: weighting of the loss over noise levels")
    )
    seed: int = field(  # torch takes 64 bits, and grids count up from it
        default=0, metadata=_about("optimisation", "all randomness follows from it", minimum=0, maximum=2**62)
    )

    mixed_precision: MixedPrecision = field(
        default="no",
        metadata=_about("memory and speed", "dtype of the frozen base and of the arithmetic; generators stay float32"),
    )
    quantization: Quantization | None = field(
        default=None,
        metadata=_about(
            "memory and speed",
            "keep the frozen denoiser in 4 or 8 bits (QOFT), by one of the libraries of oft-diffusion[quant]; nf4 and "
            "int8 are bitsandbytes'",
        ),
    )
    text_encoder_quantization: Quantization | None = field(
        default=None, metadata=_about("memory and speed", "the same for the text encoders")
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_about("memory and speed", "less memory for a third more time", free=True)
    )
    cache_latents: bool = field(
        default=True,
        metadata=_about("memory and speed", "encode every picture once and keep the VAE off the device", free=True),
    )
    cache_text_embeddings: bool = field(
        default=False,
        metadata=_about(
            "memory and speed", "encode every prompt once and keep the text encoder off the device", free=True
        ),
    )
    layer_offload: float = field(
        default=0.0,
        metadata=_about(
            "memory and speed",
            "share of the denoiser's layers whose weights wait in the processor's memory, and come to the card one by "
            "one; 1 for all, 0 for none",
            minimum=0.0,
            maximum=1.0,
            free=True,
        ),
    )
    drop_encoders: bool = field(
        default=False,
        metadata=_about(
            "memory and speed",
            "free VAE and text encoders while training, and read them from disk anew for pictures; needs both caches",
            free=True,
        ),
    )

    validation_prompts: tuple[str, ...] = field(
        default=("a photo of {trigger} {class_word}",),
        metadata=_about("pictures on the way", "prompts of the picture grids; an empty list, no grids", free=True),
    )
    validation_every: int = field(
        default=500,
        metadata=_about(
            "pictures on the way",
            "steps between grids (one before the first step and one after the last anyway)",
            minimum=1,
            free=True,
        ),
    )
    validation_count: int = field(
        default=4,
        metadata=_about(
            "pictures on the way", "pictures per prompt, each with its fixed seed", minimum=1, maximum=64, free=True
        ),
    )
    sampling_steps: int = field(
        default=25,
        metadata=_about(
            "pictures on the way", "denoising steps for grids and class images", minimum=1, maximum=1000, free=True
        ),
    )
    guidance_scale: float = field(
        default=7.5,
        metadata=_about("pictures on the way", "guidance for grids and class images", minimum=0.0, free=True),
    )

    evaluation_count: int = field(
        default=0,
        metadata=_about(
            "pictures on the way",
            "pictures behind each figure in the report; only for the pocket base and subjects of its world",
            minimum=0,
            maximum=1000,
            free=True,
        ),
    )

    checkpoint_every: int = field(
        default=500, metadata=_about("output", "steps between checkpoints; 0: only at the end", minimum=0, free=True)
    )
    keep_checkpoints: int = field(
        default=2, metadata=_about("output", "older checkpoints are deleted", minimum=1, free=True)
    )
    resume: str | None = field(
        default=None,
        metadata=_about(
            "output", 'go on from a checkpoint folder, or "latest" for the newest in output_dir', free=True
        ),
    )
    overwrite: bool = field(
        default=False,
        metadata=_about("output", "delete an earlier run's checkpoints, adapter and grids in output_dir", free=True),
    )

    def __post_init__(self) -> None:
        # One spelling for equal settings: paths are text, lists tuples, and numbers of a float knob floats.
        for knob, hint in hints().items():
            value = getattr(self, knob)
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, int) and not isinstance(value, bool) and float in (hint, *get_args(hint)):
                value = float(value)
            object.__setattr__(self, knob, value)

    # -- what follows from the knobs ---------------------------------------------------------------------------------

    @property
    def oft(self) -> OFTConfig:
        """The adapter's settings.

        Raises:
            ConfigError: a value is outside what `OFTConfig` allows.
        """
        return OFTConfig(**{f.name: getattr(self, f.name) for f in fields(OFTConfig) if f.name != "side"})

    @property
    def text_encoder_oft(self) -> OFTConfig:
        """Text encoders': the same, but regular expressions are the denoiser's, so there "attention" stands."""
        own = self.oft.to_dict()
        return OFTConfig.from_dict(own if isinstance(self.targets, str) else own | {"targets": "attention"})

    @property
    def class_folder(self) -> Path:
        """Where class images lie."""
        return Path(self.class_dir) if self.class_dir is not None else Path(self.output_dir) / "class_images"

    def fill(self, prompt: str) -> str:
        """A prompt with `{trigger}` and `{class_word}` filled in.

        Raises:
            ConfigError: another name stands in braces, or a brace is alone.
        """
        try:
            return prompt.format(trigger=self.trigger, class_word=self.class_word)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"the prompt {prompt!r} has braces that mean nothing ({error})",
                expected="no braces but {trigger} and {class_word}",
                fix="write {{ and }} for braces that belong to the prompt",
            ) from None

    # -- other forms -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {knob: list(v) if isinstance(v, tuple) else v for knob, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the settings") -> TrainConfig:
        """Rebuild from `to_dict`'s output, or any part of it that holds what has no default.

        `memory`, such as "12 GB", is no knob, but stands for some (`memory_presets.py`) that are not in the data. Which
        depends on the base: of a hub id its configs are fetched, unless the hub's cache has them.

        Raises:
            ConfigError: unknown names (each with the nearest known one), required ones missing, or too little memory.
        """
        data = memory_presets.filled(data)
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in data if key not in known]:
            guesses = [config_io.nearest(key, [*known, "memory"]) for key in unknown]
            raise ConfigError(
                f"{source} holds unknown setting(s): {', '.join(guesses)}",
                expected="names that `train --help` lists",
                fix="correct or delete them",
            )
        required = [f.name for f in fields(cls) if f.name in REQUIRED]
        if missing := [name for name in required if name not in data]:
            raise ConfigError(
                f"{source} lacks {', '.join(missing)}",
                expected=f"at least {', '.join(required)}",
                fix="add "
                + " ".join(f"--{name.replace('_', '-')} ..." for name in missing)
                + ", or put them in the TOML file",
            )
        return cls(**dict(data))

    @classmethod
    def from_toml(
        cls,
        path: str | Path,
        overrides: Mapping[str, Any] | None = None,
        shipped: Mapping[str, Callable[[], Path]] | None = None,
    ) -> TrainConfig:
        """Read a TOML file of flat `knob = value` lines; `overrides` win.

        `shipped` are names that stand for models, with what finds these.

        Raises:
            ConfigError: the file is missing or no TOML, or as `from_dict`.
        """
        data = config_io.read_toml(Path(path)) | dict(overrides or {})
        return cls.from_dict(_found(data, shipped), source=str(path))

    def to_toml(self) -> str:
        """TOML text that `from_toml` reads back to an equal config. Knobs that are None are left out."""
        groups: dict[str, dict[str, Any]] = {}
        for f in fields(self):
            groups.setdefault(f.metadata["group"], {})[f.name] = getattr(self, f.name)
        return config_io.write_toml(groups)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add `--config FILE.toml` and one option per knob; only options that were given reach the namespace."""
        parser.add_argument(
            "--memory",
            default=argparse.SUPPRESS,
            metavar="|".join(memory_presets.MEMORIES),
            help="of the card: sets what fits it, as far as the file and other options do not",
        )
        config_io.add_arguments(parser, cls, hints())

    @classmethod
    def from_namespace(
        cls, namespace: argparse.Namespace, shipped: Mapping[str, Callable[[], Path]] | None = None
    ) -> TrainConfig:
        """The config of a parser prepared by `add_arguments`: the TOML file's settings, overridden by options.

        Raises:
            ConfigError: as `from_toml`.
        """
        given = {k: v for k, v in vars(namespace).items() if k in hints() or k == "memory"}
        if toml := getattr(namespace, "config", None):
            return cls.from_toml(toml, given, shipped)
        return cls.from_dict(_found(given, shipped), source="the command line")


def _found(data: Mapping[str, Any], shipped: Mapping[str, Callable[[], Path]] | None) -> dict[str, Any]:
    """Settings with the model itself in place of a shipped one's name."""
    find = (shipped or {}).get(str(data.get("model")))
    return {**data, "model": str(find())} if find else dict(data)


REQUIRED = ("model", "instance_dir", "trigger", "class_word", "output_dir")


def hints() -> dict[str, Any]:
    """Knob name to its type."""
    return get_type_hints(TrainConfig)
