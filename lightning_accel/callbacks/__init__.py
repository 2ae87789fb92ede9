"""Lightning callbacks that work on parts of the model: drop-in replacements for Lightning's own."""

from lightning_accel.callbacks.stochastic_weight_avg import StochasticWeightAveraging
from lightning_accel.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

__all__ = ["EMAWeightAveraging", "StochasticWeightAveraging", "WeightAveraging"]
