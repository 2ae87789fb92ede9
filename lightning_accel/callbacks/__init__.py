"""Lightning callbacks: averages that work on parts of the model, in place of Lightning's own, and a monitor."""

from lightning_accel.callbacks.loss_scale_monitor import LossScaleMonitor
from lightning_accel.callbacks.stochastic_weight_avg import StochasticWeightAveraging
from lightning_accel.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

__all__ = ["EMAWeightAveraging", "LossScaleMonitor", "StochasticWeightAveraging", "WeightAveraging"]
