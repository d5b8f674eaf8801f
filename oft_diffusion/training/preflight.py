"""Everything that can be wrong and be seen without loading a model, found at once, before any long work starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import is_writable
from oft_diffusion.errors import ConfigError, OFTError, TrainingError
from oft_diffusion.evaluation import Looks, looks_of
from oft_diffusion.files import FILE_NAME, load_adapter_file
from oft_diffusion.gguf_file import check_gguf, one_denoiser
from oft_diffusion.images import read_picture
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.vocabulary import is_pocket_tokenizer
from oft_diffusion.quantization import check_saved, refuse_for_training, require_installed, scheme, whole_only
from oft_diffusion.targets import choose_block_size, find_targets
from oft_diffusion.text_encoders import last_hidden_state
from oft_diffusion.training.base import Base
from oft_diffusion.training.checkpoint import (
    check_resumable,
    find_checkpoint,
    list_checkpoints,
    read_state,
    require_space,
)
from oft_diffusion.training.checks import idle_notes, raise_problems, settings_problems
from oft_diffusion.training.class_images import ClassImages, look_at_class_images
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import Picture, instance_pictures
from oft_diffusion.training.find import download_base, find_base, is_hub_id
from oft_diffusion.training.noise import density_of
from oft_diffusion.training.precision import quantizing
from oft_diffusion.training.skeleton import adapted, skeleton
from oft_diffusion.training.tokens import check_trigger, load_tokenizer, most_tokens, too_long

_SPARE_BYTES = 64_000_000  # for grids, losses and whatever else writes there


@dataclass(frozen=True)
class Plan:
    """What the checks found out on the way, for the run to use.

    Attributes:
        base: the model on disk.
        pictures: instance images with their prompts.
        class_images: None without prior preservation.
        looks: the subject's, where the report is to have figures.
        resume_from: checkpoint folder, or None.
        notes: sentences that the user should read, none of which stops the run.
    """

    base: Base
    pictures: list[Picture]
    class_images: ClassImages | None
    looks: Looks | None
    resume_from: Path | None
    notes: list[str]


def preflight(config: TrainConfig) -> Plan:
    """Check everything; nothing is written.

    Raises:
        OFTError: the one problem, or all of them in one message.
    """
    found = settings_problems(config)
    broken = {knob for problem in found for knob in problem.knobs}
    errors: list[OFTError] = [problem.error for problem in found]

    def attempt(check: Callable[[], Any], *knobs: str) -> Any:
        """The check's result; None if knobs that it needs are broken already, or if it finds a problem."""
        if broken & set(knobs):
            return None
        try:
            return check()
        except OFTError as error:
            errors.append(error)
            broken.update(knobs[:1])
            return None

    data = attempt(lambda: instance_pictures(config), "instance_dir", "resolution", *_PROMPT_KNOBS)
    resume_from = attempt(lambda: _check_resume(config), "resume", "output_dir", "steps")
    attempt(lambda: _check_output(config), "output_dir", "resume", "overwrite")
    attempt(lambda: _check_precision(config), "mixed_precision")
    attempt(lambda: _check_optimizer(config), "optimizer")
    model = config.model
    if not errors and is_hub_id(model):  # the one check that may take long, hence the last
        model = attempt(lambda: download_base(config.model), "model")
    attempt(lambda: _check_name(config), "model")
    base: Base | None = attempt(lambda: find_base(model, config.config_dir, config.model), "model", "config_dir")
    class_images, tokenizer, looks, adapter_bytes = None, None, None, 0
    if base is not None:
        attempt(lambda: _check_init_adapter(config, base), "init_adapter", "text_encoder", *_ADAPTER_KNOBS)
        attempt(lambda: _check_quantization(config, base), "quantization", "text_encoder_quantization", "denoiser_file")
        attempt(lambda: base.check_resolution(config.resolution), "resolution")
        attempt(lambda: base.check_clip_skip(config.clip_skip), "clip_skip")
        attempt(lambda: base.check_timesteps(config.min_timestep, config.max_timestep), "min_timestep", "max_timestep")
        tokenizer = attempt(lambda: load_tokenizer(base))
        if tokenizer is not None:
            attempt(lambda: check_trigger(tokenizer, config.trigger), "trigger")
            looks = attempt(lambda: _looks(config, tokenizer, data), "evaluation_count", "instance_dir")
        adapter_bytes = attempt(lambda: _adapter_bytes(config, base), "text_encoder", "clip_skip", *_ADAPTER_KNOBS) or 0
        if config.prior_preservation is True:
            knobs = ("class_dir", "output_dir", "instance_dir", *_CLASS_KNOBS)
            class_images = attempt(lambda: look_at_class_images(config, base), *knobs)
    attempt(lambda: _check_space(config, class_images, adapter_bytes), "output_dir", "resolution", "keep_checkpoints")
    raise_problems(errors)
    assert base is not None
    assert tokenizer is not None
    pictures, notes = data
    prompts = {p.prompt for p in pictures} | {config.fill(prompt) for prompt in config.validation_prompts}
    if class_images is not None:
        prompts |= set(class_images.prompts)
    most = most_tokens(base, tokenizer)
    cut = [prompt for prompt in sorted(prompts) if too_long(tokenizer, prompt, most)]
    notes += [f"longer than the text encoder reads, and cut: {prompt!r}" for prompt in cut]
    notes += _class_notes(config, class_images) + idle_notes(config) + _foreign_notes(config, base)
    return Plan(base, pictures, class_images, looks, resume_from, notes)


_PROMPT_KNOBS = ("trigger", "class_word", "instance_prompt")
_CLASS_KNOBS = (
    "class_prompts",
    "class_word",
    "resolution",
    "num_class_images",
    "seed",
    "sampling_steps",
    "guidance_scale",
    "clip_skip",
)
# What commands hand to `command.main` as shipped, and how Python finds it; this package may not import that.
_COMMAND_LINE_NAMES = {"pocket": "oft_diffusion.pocket.pocket_path()"}
_ADAPTER_KNOBS = tuple(f.name for f in fields(OFTConfig))


def _looks(config: TrainConfig, tokenizer: Any, data: tuple[list[Picture], list[str]] | None) -> Looks | None:
    """What the figures need to know of the subject; None where there are to be none."""
    if config.evaluation_count == 0 or data is None:
        return None
    if not is_pocket_tokenizer(tokenizer):
        raise ConfigError(
            f"evaluation_count = {config.evaluation_count}, but {config.model} is no base of the pocket world",
            expected="the shipped base, whose pictures a classifier of ours can read",
            fix="leave evaluation_count out",
        )
    return looks_of(load_classifier(), [read_picture(picture.path) for picture in data[0]])


def _check_name(config: TrainConfig) -> None:
    if config.model in _COMMAND_LINE_NAMES and not Path(config.model).exists():
        raise ConfigError(
            f"model = {config.model!r} is a name that the command line alone knows",
            expected="in Python, the model's folder",
            fix=f"use model = str({_COMMAND_LINE_NAMES[config.model]})",
        )


def _check_resume(config: TrainConfig) -> Path | None:
    if config.resume is None:
        return None
    folder = find_checkpoint(config.resume, Path(config.output_dir))
    state = read_state(folder)
    check_resumable(state, config)
    if state["step"] > config.steps:
        raise TrainingError(
            f"{folder} is at step {state['step']}, past steps = {config.steps}",
            expected="a run that still has steps to do",
            fix=f"use steps above {state['step']}",
        )
    return folder


def _check_output(config: TrainConfig) -> None:
    """The folder can be written, and holds no other run."""
    folder = Path(config.output_dir)
    if not is_writable(folder):
        raise TrainingError(
            f"output_dir = {config.output_dir!r} cannot be written",
            expected="a folder, or a path where one can be made",
            fix="choose another output_dir",
        )
    if config.resume is not None:
        _check_no_later_checkpoint(find_checkpoint(config.resume, folder), folder)
    earlier = list_checkpoints(folder) or [p for p in (folder / FILE_NAME,) if p.exists()]
    if earlier and config.resume is None and not config.overwrite:
        raise TrainingError(
            f"{folder} holds an earlier run ({earlier[-1].name})",
            expected="an output_dir of this run's own",
            fix="choose another output_dir, go on with --resume latest, or delete that run with --overwrite",
        )


def _check_no_later_checkpoint(resume_from: Path, folder: Path) -> None:
    """Going on from an older one, new checkpoints would count as older than those, and be deleted first."""
    step = read_state(resume_from)["step"]
    if later := [p for p in list_checkpoints(folder) if int(p.name.rpartition("-")[2]) > step]:
        raise TrainingError(
            f"{folder} holds checkpoints later than {resume_from.name}: {', '.join(p.name for p in later)}",
            expected="the newest checkpoint there, or an output_dir of this run's own",
            fix="go on with --resume latest, choose another output_dir, or delete the later checkpoints",
        )


def _check_init_adapter(config: TrainConfig, base: Base) -> None:
    """The adapter to continue from is readable, and was made here with the settings that are asked for now."""
    if config.init_adapter is None or config.resume is not None:  # a resumed run has long left it behind
        return
    found = load_adapter_file(config.init_adapter)
    wanted = adapted(config, base)
    if set(found.components) != set(wanted):
        raise ConfigError(
            f"{config.init_adapter} adapts {', '.join(sorted(found.components))}",
            expected=f"{', '.join(sorted(wanted))}, as text_encoder = {str(config.text_encoder).lower()} says",
            fix=f"set text_encoder = {str('text_encoder' in found.components).lower()}",
        )
    changed = [
        f"{component}'s {key} is {value!r} there, {now!r} here"
        for component, settings in wanted.items()
        for key, value in found.metadata.components[component].to_dict().items()
        if (now := settings.to_dict()[key]) not in (value, "auto")
    ]
    if changed:
        raise ConfigError(
            f"{config.init_adapter} was made with other adapter settings: {'; '.join(changed)}",
            expected="the same settings",
            fix="use the adapter's own",
        )


def _check_precision(config: TrainConfig) -> None:
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "mixed_precision = 'fp16' needs a GPU, and there is none",
            expected="'no' or 'bf16' on a CPU",
            fix="use mixed_precision = 'no'",
        )


def _check_quantization(config: TrainConfig, base: Base) -> None:
    """Libraries are there, and can work on this machine; and the base is one whose parts are loaded one by one."""
    learning = {"quantization": config.quantization}
    if config.text_encoder:
        learning["text_encoder_quantization"] = config.text_encoder_quantization
    for setting, name in learning.items():
        if name is not None:
            refuse_for_training(scheme(name), setting)
    wanted = quantizing(config, base)
    if (wanted is not None or config.denoiser_file is not None) and base.single_file:
        raise whole_only(config.model)
    if config.denoiser_file is not None:
        check_gguf(Path(config.denoiser_file))
        if base.experts:
            raise one_denoiser(config.model, len(base.experts))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = {part: way.name for part, way in wanted.schemes.items()} if wanted is not None else {}
    loaded = {part: own for part, own in base.parts.items() if not (config.denoiser_file and part in base.denoisers)}
    check_saved(config.model, loaded, ways, device)


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer == "adamw8bit":
        require_installed("bitsandbytes", "optimizer = 'adamw8bit'")


def _adapter_bytes(config: TrainConfig, base: Base) -> int:
    """The adapter file's size. Unusable targets and block sizes are found on the way.

    Raises:
        OFTError: a pattern matches nothing, a block size does not fit, or a component's config is unusable.
    """
    size = 0
    for name, settings in adapted(config, base).items():
        used = last_hidden_state(base.pipeline, name, config.clip_skip or 0)
        targets = find_targets(skeleton(base, name), settings.targets, hidden_state=used)
        block_size = choose_block_size(targets, settings.block_size)
        size += 4 * sum(target.in_features * (block_size - 1) // 2 for target in targets)
    return size


def _check_space(config: TrainConfig, class_images: ClassImages | None, adapter_bytes: int) -> None:
    # A checkpoint holds the adapter, the generators and Adam's two moments; one more than kept exists while writing.
    size = adapter_bytes + 4 * adapter_bytes * (config.keep_checkpoints + 1)
    require_space(Path(config.output_dir), _SPARE_BYTES + size, "adapter, checkpoints and pictures")
    if class_images is not None and class_images.missing:
        size = len(class_images.missing) * config.resolution**2 * 3  # a PNG is hardly larger than its pixels
        require_space(config.class_folder, size, f"{len(class_images.missing)} class images")


def _foreign_notes(config: TrainConfig, base: Base) -> list[str]:
    """A sentence about knobs that are meant for another kind of model."""
    density = density_of(config.timestep_density, base.prediction_type)
    idle: tuple[str, ...] = (
        ("min_snr_gamma",) if base.prediction_type == "flow" else ("timestep_shift", "flow_weighting")
    )
    idle += () if density == "logit-normal" else ("logit_mean",)
    idle += () if density in ("logit-normal", "sigmoid") else ("logit_std",)
    idle += () if density == "mode" else ("mode_scale",)
    defaults = {f.name: f.default for f in fields(config)}
    named = [f"{knob} = {getattr(config, knob)!r}" for knob in idle if getattr(config, knob) != defaults[knob]]
    if not named:
        return []
    return [
        f"this model predicts {base.prediction_type} and levels are {density}, so this does nothing: {', '.join(named)}"
    ]


def _class_notes(config: TrainConfig, images: ClassImages | None) -> list[str]:
    if images is None:
        return []
    if images.own:
        return [f"{config.class_folder} holds {len(images.paths)} images of your own; they are used as class images"]
    return [f"class images: {len(images.paths) - len(images.missing)} reused, {len(images.missing)} to be made"]
