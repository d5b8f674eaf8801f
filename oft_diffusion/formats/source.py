"""A file of another tool in memory: its tensors by layer, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oft_diffusion.disk import SEAL_KEY, parse_json, read_safetensors
from oft_diffusion.errors import AdapterFileError, first_line
from oft_diffusion.files import AdapterFile
from oft_diffusion.formats.components import describe
from oft_diffusion.formats.guess import guessed_base
from oft_diffusion.formats.names import Meaning, read_names
from oft_diffusion.hooks import unwrap
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.plan import StrengthMode
from oft_diffusion.targets import canonical_name, find_layers

# What follows a layer's key, in any tool's file. The longest that fits is taken.
SUFFIXES = (
    "oft_R.weight", "oft_rotation.weight", "oft_R.scaled_oft", "oft_blocks", "oft_diag", "alpha", "rescale",
    "oft_block_size_metadata", "oft_block_share_metadata", "oft_coft_metadata", "coft_eps_metadata",
    "scaled_oft_metadata", "oft_block_size_buffer", "oft_rank_buffer", "oft_coft_buffer", "oft_coft_eps_buffer",
    "oft_block_share_buffer", "oft_use_cayley_neumann_buffer", "oft_num_cayley_neumann_terms_buffer",
)  # fmt: skip
# What we cannot represent, and what it is.
REFUSED = {
    "oft_R.clipped_oft": "clipped OFT", "oft_R.cans_oft": "CANS-OFT", "dora_scale": "DoRA-OFT",
    "initial_norm": "DoRA-OFT", "dora_log_multiplier": "DoRA-OFT", "dora_multiplier": "DoRA-OFT",
    "boft_R": "BOFT", "boft_s": "BOFT", "oft_r": "OFT of PEFT 0.15 or older", "oft_s": "OFT of PEFT 0.15 or older",
    "oft_r.default": "OFT of PEFT 0.15 or older", "oft_s.default": "OFT of PEFT 0.15 or older",
    "oft_embedding_R.weight": "OFT of an embedding",
}  # fmt: skip
# What tools can train beside OFT, in the same file.
_BESIDE = {
    "w_norm": "norms (LyCORIS's train_norm)", "b_norm": "norms (LyCORIS's train_norm)",
    "diff": "whole weights (LyCORIS's algo=full)", "diff_b": "biases",
    "bias": "biases (PEFT's bias or modules_to_save)", "lora_down.weight": "a LoRA", "lora_up.weight": "a LoRA",
    "lora_A.weight": "a LoRA", "lora_B.weight": "a LoRA", "lokr_w1": "a LoKr", "lokr_w2": "a LoKr",
    "hada_w1_a": "a LoHa", "weight": "whole layers (PEFT's modules_to_save)",
}  # fmt: skip
_OTHERS = ("lora", "lokr", "hada_", "ia3", ".diff", "glora", "vera", ".a1.", ".b1.")
_LEFT_OUT = ("bundle_emb.",)  # OneTrainer's embeddings: told, not loaded
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # settings, too
_MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class Source:
    """A file as it was read.

    Attributes:
        name: for messages.
        path: the file.
        groups: by foreign layer key, tensors by suffix; a suffix may have a number behind it.
        header: the texts in the safetensors header.
        config: PEFT's adapter_config.json, or what diffusers writes of it into the header; empty where there is none.
            `save_lora_weights` has entries of several components in it, `unet.eps`: see `settings_of`.
        left_out: tensors that are no adapter's.
    """

    name: str
    path: Path
    groups: Mapping[str, Mapping[str, Tensor]]
    header: Mapping[str, str]
    config: Mapping[str, Any]
    left_out: tuple[str, ...]

    def has(self, *suffixes: str) -> bool:
        """Whether some layer has a tensor of one of these suffixes, or of one that begins so and a dot follows."""
        return any(suffix.startswith(tuple(f"{s}." for s in suffixes)) or suffix in suffixes for suffix in self._all())

    def _all(self) -> set[str]:
        return {suffix for tensors in self.groups.values() for suffix in tensors}

    @property
    def configured(self) -> list[str]:
        """The components that its configuration tells apart; none where it has one for all."""
        return list(dict.fromkeys(entry.partition(".")[0] for entry in self.config if "." in entry))

    def settings_of(self, component: str) -> Source:
        """The same file with the configuration of one component alone."""
        if not self.configured:
            return self
        own = {e.removeprefix(f"{component}."): v for e, v in self.config.items() if e.startswith(f"{component}.")}
        return replace(self, config=own)

    @property
    def trained_on(self) -> str:
        """What it was trained on, as far as it tells."""
        return guessed_base(self.header, self.config, self.groups)

    def arguments(self, entry: str) -> dict[str, Any]:
        """A JSON object in the header; empty where there is none.

        Raises:
            AdapterFileError: it cannot be read, so that nobody knows what it asks for.
        """
        try:
            found = parse_json(self.header.get(entry, "{}"))
            if not isinstance(found, dict):
                raise TypeError("it is no JSON object")
        except (TypeError, ValueError) as error:
            raise AdapterFileError(
                f"{self.name} has settings under {entry} that cannot be read ({first_line(error)})",
                expected="a JSON object",
                fix="download or copy the file again",
            ) from error
        return found


@dataclass(frozen=True)
class Imported:
    """A file of any tool as one of ours.

    Attributes:
        file: as `load_adapter_file` returns it.
        format: whose it is.
        notes: what a user should know, in sentences.
        unmatched: layers of the file that the pipeline does not have (`strict=False`).
    """

    file: AdapterFile
    format: str
    notes: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()

    @property
    def mode(self) -> StrengthMode:
        """How that tool takes strengths."""
        return self.file.metadata.mode


@dataclass(frozen=True)
class Match:
    """A foreign layer key, what it means, the modules that it means, and the class of the component they are in."""

    key: str
    meaning: Meaning
    owner: str
    modules: tuple[nn.Module, ...]
    tensors: Mapping[str, Tensor]


def read_source(path: Path) -> Source:
    """Read a file, and PEFT's configuration beside it.

    Raises:
        AdapterFileError: it is broken, no OFT adapter, one that we cannot represent, or its numbers are not finite.
    """
    tensors, header = read_safetensors(path, lambda names: _check_names(path.name, names))
    if HEADER_KEY in header or SEAL_KEY in header:
        raise AdapterFileError(
            f"{path.name} is a file of oft-diffusion" + (" without its metadata" if HEADER_KEY not in header else ""),
            expected="another tool's file",
            fix="download or copy the file again, and load it as one of oft-diffusion",
        )
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]:
        raise AdapterFileError(
            f"{path.name} has numbers of {tensors[strange[0]].dtype} in {_shown(strange)}",
            expected="floating numbers of 16 to 64 bits",
            fix="save it with such numbers in the tool that wrote it",
        )
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    if bad:
        raise AdapterFileError(
            f"{path.name} has values that are not finite in {_shown(bad)}",
            expected="finite numbers",
            fix="use an earlier checkpoint; this one is broken",
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(_LEFT_OUT):
            key, suffix = _split(name)
            groups.setdefault(key, {})[suffix] = tensor
    left_out = tuple(name for name in tensors if name.startswith(_LEFT_OUT))
    return Source(path.name, path, groups, header, _config(path, header), left_out)


def match_layers(
    source: Source, parts: Mapping[str, nn.Module], component: str | None, *, strict: bool
) -> tuple[list[Match], tuple[str, ...]]:
    """The layers that a file's keys mean, and the keys that mean none.

    Raises:
        AdapterFileError: some key is no layer's and `strict`, all are, or it may be that of several components.
    """
    known = read_names(
        describe(parts), source.groups, component, source=source.name, trained_on=source.trained_on, strict=strict
    )
    wanted: dict[str, list[str]] = {}
    for meaning in known.values():
        wanted.setdefault(meaning.component, []).extend(meaning.layers)
    found = {
        part: {canonical_name(t.name): t.module for t in find_layers(parts[part], layers)}
        for part, layers in wanted.items()
    }
    owners = {part: type(unwrap(parts[part])).__name__ for part in wanted}
    matches = []
    for key, meaning in known.items():
        modules = tuple(found[meaning.component][canonical_name(name)] for name in meaning.layers)
        matches.append(Match(key, meaning, owners[meaning.component], modules, source.groups[key]))
    return matches, tuple(key for key in source.groups if key not in known)


def _check_names(file_name: str, names: Sequence[str]) -> None:
    own = [name for name in names if not name.startswith(_LEFT_OUT)]
    if not own:
        raise _no_adapter(file_name, "no tensors of an adapter at all", "")
    for name in own:
        if refused := next((what for suffix, what in REFUSED.items() if name.endswith(f".{suffix}")), None):
            raise AdapterFileError(
                f"{file_name} is {refused}, as {name} tells, which has no exact counterpart here",
                expected="OFT or OFTv2 of linear layers and convolutions",
                fix="use it in the tool that wrote it, or merge it into a model there",
            )
    unknown = [name for name in own if _split(name)[1] == ""]
    if unknown and len(unknown) < len(own):
        what = next((what for end, what in _BESIDE.items() if unknown[0].endswith(f".{end}")), "tensors of no OFT")
        raise AdapterFileError(
            f"{file_name} has {what} beside its rotations, such as {unknown[0]}, which have no counterpart here",
            expected="rotations alone",
            fix="train without them, or merge the file into a model with the tool that wrote it",
        )
    if unknown:
        lora = any(word in unknown[0] for word in _OTHERS)
        advice = " (this looks like a LoRA or one of its kin: load it with diffusers' load_lora_weights)"
        raise _no_adapter(file_name, f"tensors such as {unknown[0]}", advice if lora else "")


def _no_adapter(file_name: str, found: str, advice: str) -> AdapterFileError:
    return AdapterFileError(
        f"{file_name} is no OFT adapter: it has {found}{advice}",
        expected="an OFT adapter of oft-diffusion, PEFT, OneTrainer, sd-scripts, LyCORIS or ComfyUI-OFTv2",
        fix="check that this is the right file",
    )


def _split(name: str) -> tuple[str, str]:
    """A tensor's layer key and suffix; no suffix where it has none that we know."""
    for suffix in SUFFIXES:
        if name.endswith(f".{suffix}"):
            return name[: -len(suffix) - 1], suffix
    key, marker, number = name.partition(".oft_blocks.")
    return (key, f"oft_blocks.{number}") if marker and number.isdecimal() and len(number) < 4 else (name, "")


def _config(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    beside = path.parent / "adapter_config.json"
    text = header.get("lora_adapter_metadata")  # by diffusers' save_lora_adapter and save_lora_weights
    try:
        if path.name == "adapter_model.safetensors" and beside.is_file():
            if beside.stat().st_size > _MAX_CONFIG_BYTES:
                raise ValueError(f"it has {beside.stat().st_size:,} bytes")
            text = beside.read_text(encoding="utf-8")
        if text is None:
            return {}
        config = parse_json(text)
        if not isinstance(config, dict) or not config:
            raise ValueError("it is no JSON object, or an empty one")
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            f"the configuration of {path.name} cannot be read ({first_line(error)})",
            expected="PEFT's adapter_config.json",
            fix="download or copy the folder again",
        ) from error
    return config


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
