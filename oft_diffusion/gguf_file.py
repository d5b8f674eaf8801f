"""A GGUF file in the place of a model's denoiser (`denoiser_file`): checked, counted, loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import diffusers
import torch

from oft_diffusion.errors import ConfigError, first_line
from oft_diffusion.quantization import require_installed


def refuse_two(quantization: str | None, denoiser_file: object) -> None:
    """Raise where a denoiser is to come quantized from a file, and to be quantized.

    Raises:
        ConfigError: both are given.
    """
    if quantization is not None and denoiser_file is not None:
        raise ConfigError(
            f"quantization = {quantization!r} is set beside denoiser_file, whose weights are quantized already",
            expected="one of the two",
            fix="leave one of them out; text_encoder_quantization goes with either",
        )


def one_denoiser(model: str, count: int) -> ConfigError:
    """The error for a model with several denoisers, where one file is to stand for its denoiser."""
    return ConfigError(
        f"{model} has {count} denoisers, and denoiser_file is one",
        expected="a model with one denoiser",
        fix="leave denoiser_file out",
    )


def load_gguf(path: Path, kind: str, configs: str | Path, part: str, dtype: torch.dtype) -> Any:
    """A denoiser with the weights of a GGUF file.

    Args:
        path: the file.
        kind: its class, of diffusers.
        configs: the pipeline's folder or hub id, for the denoiser's config.
        part: its name there.
        dtype: to compute in.

    Raises:
        ConfigError: it is no GGUF file, gguf is not installed, or diffusers cannot load it.
    """
    check_gguf(path)
    model: Any = getattr(diffusers, kind)
    try:
        config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        return model.from_single_file(
            str(path), quantization_config=config, config=str(configs), subfolder=part, torch_dtype=dtype
        )
    except Exception as error:  # diffusers, gguf and numpy each have their own
        raise ConfigError(
            f"diffusers cannot load {path} as a {kind} ({first_line(error)})",
            expected="a GGUF file of the same architecture as the model's denoiser",
            fix="get the file that belongs to this model, or leave denoiser_file out",
        ) from error


def check_gguf(path: Path) -> None:
    """Refuse what cannot be read as GGUF.

    Raises:
        ConfigError: there is no such file, it is another kind, or gguf is not installed.
    """
    if not path.is_file() or _first_bytes(path) != b"GGUF":
        raise ConfigError(
            f"denoiser_file = {str(path)!r} is no GGUF file",
            expected="a file of quantized weights as llama.cpp and ComfyUI-GGUF have them (*.gguf)",
            fix="correct the path",
        )
    require_installed("gguf", f"denoiser_file = {str(path)!r}")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def gguf_bytes(path: Path, dtype: torch.dtype) -> int:
    """Of all tensors in a GGUF file once it is loaded: what is not quantized is cast to the dtype computed in."""
    import gguf

    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    tensors = gguf.GGUFReader(path).tensors
    return sum(int(t.n_elements) * dtype.itemsize if t.tensor_type in plain else int(t.n_bytes) for t in tensors)


def gguf_digest(path: Path) -> str:
    """Of a GGUF file, its size, and bytes from all over it: told in milliseconds."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in range(0, size, max(1, size // 256)):
            file.seek(place)
            digest.update(file.read(4096))
    return digest.hexdigest()
