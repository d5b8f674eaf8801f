"""SDXL's UNet at its real size, random bfloat16 weights: one training step on a CPU, in a process of its own. Slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")]

_STEP = """
import json, time
import torch
from diffusers import UNet2DConditionModel
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.training.noise import Diffusion

torch.manual_seed(0)
with torch.device("meta"):
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )
unet = unet.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
for name, parameter in unet.named_parameters():
    fan = parameter.shape[1:].numel() if parameter.dim() > 1 else 0
    parameter.normal_(std=fan**-0.5) if fan else parameter.fill_(1.0 if "norm" in name and "weight" in name else 0.0)
bank = inject_oft(unet, OFTConfig())
unet.enable_gradient_checkpointing()
unet.train()
adamw = torch.optim.AdamW(bank.parameters(), lr=3e-6)  # a deep random net; Adam moves all of its generators at once
noise = Diffusion({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
latents, drawn, levels = torch.randn(1, 4, 64, 64), torch.randn(1, 4, 64, 64), torch.tensor([500])
told = {
    "encoder_hidden_states": torch.randn(1, 77, 2048, dtype=torch.bfloat16),
    "added_cond_kwargs": {
        "text_embeds": torch.randn(1, 1280, dtype=torch.bfloat16),
        "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]]),
    },
}
losses, seconds = [], []
for _ in range(2):
    started = time.perf_counter()
    answer = unet(noise.add(latents, drawn, levels).bfloat16(), levels, **told).sample
    loss = (answer.float() - noise.target(latents, drawn, levels)).pow(2).mean()
    loss.backward()
    adamw.step()
    losses.append(float(loss.detach()))
    seconds.append(time.perf_counter() - started)
    moved = [bool(p.grad.abs().sum(1).gt(0).any()) for p in bank.parameters()]
    adamw.zero_grad()
# Of this process alone: ru_maxrss would go on from the peak of the process that started this one.
[high] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps({
    "layers": len(bank.hooks), "weights": sum(p.numel() for p in unet.parameters()), "moved": all(moved),
    "parameters": sum(p.numel() for p in bank.parameters()), "losses": losses, "seconds": seconds,
    "peak": int(high.split()[1]) / 2**20,
}))
"""


def test_a_training_step_of_sdxl_fits_a_cpu(record_property: Callable[[str, object], None]) -> None:
    done = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 560
    assert found["weights"] > 2.5e9
    assert found["moved"]
    assert all(0 < loss < 1000 for loss in found["losses"])
    assert found["losses"][1] < found["losses"][0]
    assert found["peak"] < 16
    first, second = found["losses"]
    record_property(
        "figure",
        f"SDXL's UNet, 512 px, bfloat16, batch 1, checkpointed: {found['parameters'] / 1e6:.1f} M parameters in "
        f"{found['layers']} layers; losses {first:.3f}, {second:.3f}; {found['seconds'][1]:.0f} s per step; peak "
        f"memory of the process {found['peak']:.1f} GiB",
    )
