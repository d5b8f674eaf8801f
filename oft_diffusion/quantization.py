"""Ways to quantize a base while it is loaded, by name, as the configs that diffusers and transformers take."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
import transformers
from torch import nn

from oft_diffusion.errors import ConfigError

Library = Literal["diffusers", "transformers"]
_DISTRIBUTIONS = {"optimum.quanto": "optimum-quanto"}
INSTALL = 'pip install "oft-diffusion[quant]"'


@dataclass(frozen=True)
class Scheme:
    """One way.

    Attributes:
        name: as settings spell it.
        package: what it needs, as Python imports it.
        config: by library and dtype to compute in, the config to load a component with.
        size: bytes of a weight `(out, in)` and of what goes with it, whose scales may be of the dtype computed in, with
            its bytes.
        bits: of one number of it, without what goes with it.
        needs_cuda: whether its library has no code for a processor.
        trains: whether gradients pass through its layers, which an adapter before them needs.
    """

    name: str
    package: str
    config: Callable[[Library, torch.dtype], Any]
    size: Callable[[int, int, int], int]
    bits: int = 8
    needs_cuda: bool = False
    trains: bool = True

    def require(self, device: str) -> None:
        """Raise where it cannot be used.

        Args:
            device: as torch spells it.

        Raises:
            ConfigError: its library is not installed, or has no code for the device.
        """
        require_installed(self.package, f"quantization {self.name!r}")
        if self.needs_cuda and not device.startswith("cuda"):
            others = [name for name, scheme in SCHEMES.items() if not scheme.needs_cuda]
            raise ConfigError(
                f"quantization {self.name!r} runs on CUDA cards only, and this is {device!r}",
                expected="a CUDA card, or one of " + ", ".join(others),
                fix="choose one of these",
            )


def refuse_for_training(way: Scheme, setting: str) -> None:
    """Raise where nothing that comes before such layers could learn.

    Args:
        way: how the layers would be quantized.
        setting: whose value that is.

    Raises:
        ConfigError: no gradient passes through them.
    """
    if not way.trains:
        others = [name for name, scheme in SCHEMES.items() if scheme.trains]
        raise ConfigError(
            f"{setting} = {way.name!r} is for drawing alone: {way.package} has no gradient of its product",
            expected=", ".join(others),
            fix="use one of these; the adapter then draws on any of them",
        )


def require_installed(package: str, what: str) -> None:
    """Raise where a library is missing.

    Args:
        package: as Python imports it.
        what: that needs it, in words.

    Raises:
        ConfigError: it is missing.
    """
    if not is_installed(package):
        raise ConfigError(
            f"{what} needs {_DISTRIBUTIONS.get(package, package)}, which is not installed",
            expected="it installed",
            fix=INSTALL,
        )


def is_installed(package: str) -> bool:
    """Whether a library is there, as Python imports it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package in a package, the outer one
        return False


def _bitsandbytes(library: Library, **options: Any) -> Any:
    module: Any = diffusers if library == "diffusers" else transformers
    return module.BitsAndBytesConfig(**options)


def _nf4(library: Library, dtype: torch.dtype) -> Any:
    return _bitsandbytes(
        library, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip


def _int8(library: Library, dtype: torch.dtype) -> Any:
    return _bitsandbytes(library, load_in_8bit=True)


def _torchao(kind: str) -> Callable[[Library, torch.dtype], Any]:
    def config(library: Library, dtype: torch.dtype) -> Any:
        import torchao.quantization as ao

        made: Any = {
            "int8": lambda: ao.Int8WeightOnlyConfig(),
            "int4": lambda: ao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"),
            "float8": lambda: ao.Float8WeightOnlyConfig(),
        }[kind]()
        return (diffusers.TorchAoConfig if library == "diffusers" else transformers.TorchAoConfig)(made)

    return config


def _quanto(kind: str) -> Callable[[Library, torch.dtype], Any]:
    def config(library: Library, dtype: torch.dtype) -> Any:
        if library == "diffusers":
            return diffusers.QuantoConfig(weights_dtype=kind)
        return transformers.QuantoConfig(weights=kind)

    return config


def _nf4_size(out: int, columns: int, plain: int) -> int:
    """Half a byte each; per block a byte of scale; per 256 of these four bytes; an offset and two tables."""
    block = _block_of(columns)
    if block is None:
        return out * columns * plain
    blocks = math.ceil(out * columns / block)
    return math.ceil(out * columns / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * (16 + 256)


def _bytes_and_row_scales(out: int, columns: int, scale: int) -> int:
    return out * columns + scale * out


SCHEMES: dict[str, Scheme] = {
    found.name: found
    for found in (
        Scheme("nf4", "bitsandbytes", _nf4, _nf4_size, bits=4),
        Scheme(
            "int8", "bitsandbytes", _int8,
            lambda out, columns, _: _bytes_and_row_scales(out, columns, 4),
        ),
        Scheme(
            "torchao-int8", "torchao", _torchao("int8"),
            lambda out, columns, _: _bytes_and_row_scales(out, columns, 5),  # and a zero point
        ),
        Scheme(
            "torchao-int4", "torchao", _torchao("int4"),
            lambda out, columns, scale: out * columns // 2 + 2 * scale * out * columns // 32, bits=4,
            needs_cuda=True, trains=False,  # torch has no derivative of _weight_int4pack_mm
        ),
        Scheme(
            "torchao-float8", "torchao", _torchao("float8"),
            lambda out, columns, _: _bytes_and_row_scales(out, columns, 4),
        ),
        Scheme("quanto-int8", "optimum.quanto", _quanto("int8"), _bytes_and_row_scales),
        Scheme("quanto-float8", "optimum.quanto", _quanto("float8"), _bytes_and_row_scales),
    )
}  # fmt: skip


def scheme(name: str) -> Scheme:
    """A way by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCHEMES:
        raise ConfigError(
            f"quantization = {name!r} is none that is known", expected=", ".join(SCHEMES), fix="use one of these"
        )
    return SCHEMES[name]


@dataclass(frozen=True)
class Quantizing:
    """Which components of a pipeline are quantized while it is loaded.

    Attributes:
        schemes: by component.
        libraries: whose class each component is.
        dtype: to compute in.
        device: that the pipeline will be on, as torch spells it.
    """

    schemes: Mapping[str, Scheme]
    libraries: Mapping[str, Library]
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        """Refuse what cannot be used (`Scheme.require`)."""
        for way in self.schemes.values():
            way.require(self.device)

    def options(self) -> dict[str, Any]:
        """Arguments for `from_pretrained` of a pipeline."""
        configs = {
            part: way.config(self.libraries[part], self.dtype)
            for part, way in self.schemes.items()
            if not self._is_refused(part)
        }
        return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=configs)} if configs else {}

    def finish(self, pipe: Any) -> None:
        """Quantize what was loaded without."""
        for part, way in self.schemes.items():
            if self._is_refused(part):
                quantize_with_bitsandbytes(getattr(pipe, part), way, self.dtype)

    def _is_refused(self, part: str) -> bool:
        """Without a card, bitsandbytes: diffusers refuses it there, and transformers makes blocks that are misread."""
        return self.schemes[part].package == "bitsandbytes" and not self.device.startswith("cuda")


def check_saved(model: str, configs: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, str], device: str) -> None:
    """Look at components that a folder holds quantized already.

    Args:
        model: whose they are.
        configs: what their config.json say, by component.
        wanted: how components are to be quantized, by component.
        device: as torch spells it.

    Raises:
        ConfigError: one is to be quantized once more, or is of bitsandbytes, and this is no card.
    """
    saved = {part: own for part, config in configs.items() if (own := config.get("quantization_config"))}
    for part, told in saved.items():
        library = told.get("quant_method", "another library")
        if part in wanted:
            raise ConfigError(
                f"{part} of {model} was saved quantized by {library}, and would be quantized again as {wanted[part]!r}",
                expected="one of the two",
                fix="leave the setting out, or load the model as it was before",
            )
        if library == "bitsandbytes" and not device.startswith("cuda"):
            raise ConfigError(
                f"{part} of {model} was saved quantized by bitsandbytes, which diffusers loads on CUDA cards only",
                expected=f"on {device!r} the model as it was before",
                fix="load that with quantization = 'nf4' or 'int8', which quantize it here",
            )


def whole_only(model: str) -> ConfigError:
    """The error for a single checkpoint file, which is loaded as it is."""
    return ConfigError(
        f"{model} is a single file, of which no part is quantized, or exchanged, while it is loaded",
        expected="a folder in diffusers' format where quantization or denoiser_file is set",
        fix="load the file once with diffusers and save_pretrained it, or leave these out",
    )


def eight_bit_adamw() -> Any:
    """The class of bitsandbytes' AdamW with moments in 8 bits."""
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit


def quantize_with_bitsandbytes(module: nn.Module, way: Scheme, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers in the place of linear ones, on a processor; but for those it would misread there.

    Args:
        module: a component in memory.
        way: "nf4" or "int8".
        dtype: to compute in.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear or kept & set(name.split(".")):
            continue
        if way.name != "nf4" or _block_of(layer.in_features) is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, _of_bitsandbytes(layer, way, dtype))
    # As diffusers notes it where it loads so: PEFT chooses the layers of a LoRA by it.
    setattr(module, "is_loaded_in_4bit" if way.name == "nf4" else "is_loaded_in_8bit", True)


def _block_of(columns: int) -> int | None:
    """How many numbers of a row share a scale. bitsandbytes 0.50 misreads blocks that reach over rows on processors."""
    return next((size for size in (64, 32) if columns % size == 0), None)


def _of_bitsandbytes(layer: nn.Linear, way: Scheme, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import modules as bnb

    shape = layer.in_features, layer.out_features, layer.bias is not None
    made: Any
    with torch.device("meta"):
        if way.name == "nf4":
            made = bnb.Linear4bit(*shape, dtype, compress_statistics=True, quant_type="nf4")
            made.support_avx512bf16_for_cpu = False  # or it packs itself for drawing, and no gradient passes any more
        else:
            made = bnb.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
    kept = {name: value for name, value in vars(made.weight).items() if name != "data"}
    if way.name == "nf4":
        kept["blocksize"] = _block_of(layer.in_features)
    # From the processor: of weights that lie on a card already, `Int8Params.to` quantizes none.
    made.weight = type(made.weight)(layer.weight.data.cpu(), requires_grad=False, **kept).to(layer.weight.device)
    made.bias = layer.bias
    return made.requires_grad_(False).train(layer.training)
