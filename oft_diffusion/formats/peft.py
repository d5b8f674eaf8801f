"""PEFT's two files, written: tensors and `adapter_config.json` in one folder per component."""

from __future__ import annotations

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
