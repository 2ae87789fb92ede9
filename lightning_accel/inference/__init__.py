"""Models that are only run: loaded in place, and run from where their weights are, if memory does not take them."""

from lightning_accel.inference.empty import init_empty_weights
from lightning_accel.inference.loading import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from lightning_accel.inference.places import infer_device_map

__all__ = [
    "cpu_offload",
    "disk_offload",
    "dispatch_model",
    "infer_device_map",
    "init_empty_weights",
    "load_checkpoint_and_dispatch",
]
