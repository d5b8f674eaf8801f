"""DreamBooth with OFT: `train(TrainConfig(...))`."""

from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.estimate import Estimate, estimate
from oft_diffusion.training.loop import TrainingRun, train
from oft_diffusion.training.preflight import preflight
from oft_diffusion.training.results import TrainResult, TrainStep

__all__ = ["Estimate", "TrainConfig", "TrainResult", "TrainStep", "TrainingRun", "estimate", "preflight", "train"]
