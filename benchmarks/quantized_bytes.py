"""What quantizing saves of memory in training, counted on bases of full size without their weights; no card is needed.

python -m benchmarks.quantized_bytes    # Markdown; a minute

Counted are bytes that are there for certain: the base, the adapter, its gradients and AdamW's moments. What comes and
goes in a step is not quantized, and in `benchmarks.full_counts`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.full_size import FULL_SIZE, write_stub
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.count import count
from oft_diffusion.training.find import find_base

WAYS: Mapping[str, Mapping[str, Any]] = {
    "bfloat16": {},
    "denoiser int8": {"quantization": "int8"},
    "denoiser NF4": {"quantization": "nf4"},
    "denoiser and encoders int8": {"quantization": "int8", "text_encoder_quantization": "int8"},
    "denoiser and encoders NF4": {"quantization": "nf4", "text_encoder_quantization": "nf4"},
}
HEAD = "| base | | denoiser, GB | text encoders | VAE | adapter in training | in all | less than bfloat16 |"


def rows(name: str) -> Iterator[str]:
    """A line of Markdown for each way to quantize a base."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_stub(name, Path(folder))
        base, whole = find_base(str(model)), 0
        for way, knobs in WAYS.items():
            config = TrainConfig.from_dict({
                "model": str(model), "instance_dir": "i", "trigger": "sks", "class_word": "dog", "output_dir": "o",
                "mixed_precision": "bf16", "parametrisation": "cayley_neumann", **knobs,
            })  # fmt: skip
            found = count(config, base)
            encoders = sum(found.parts[part] for part in base.text_encoders)
            denoiser = sum(found.parts[part] for part in base.denoisers)
            training = found.adapter_bytes + found.training_bytes
            every = found.base_bytes + training
            whole = whole or every
            cells = (denoiser, encoders, found.parts["vae"], training, every, whole - every)
            yield f"| {name} | {way} | {' | '.join(f'{cell / 1e9:.2f}' for cell in cells)} |"


def table() -> str:
    """Markdown, of every base."""
    lines = [line for name in FULL_SIZE for line in rows(name)]
    return "\n".join([HEAD, "|---" * 8 + "|", *lines])


if __name__ == "__main__":
    print(table())
