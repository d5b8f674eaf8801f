"""DreamBooth with OFT: `train(TrainConfig(...))`."""

from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.loop import TrainingRun, train
from oft_diffusion.training.preflight import preflight
from oft_diffusion.training.results import TrainResult, TrainStep

__all__ = ["TrainConfig", "TrainResult", "TrainStep", "TrainingRun", "preflight", "train"]
