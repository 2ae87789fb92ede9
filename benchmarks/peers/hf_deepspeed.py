"""Hugging Face Accelerate with its DeepSpeed plugin."""

from pathlib import Path
from typing import Any

from benchmarks.models import MODELS, build_optimizer
from benchmarks.peers.deepspeed_settings import settings
from benchmarks.peers.deepspeed_zero import DeepSpeedZeRO

from accelerate import Accelerator, DeepSpeedPlugin  # isort: skip - after DeepSpeed was told that it is on a CPU


class AccelerateDeepSpeed(DeepSpeedZeRO):
    """``Accelerator(deepspeed_plugin=...)``; with the settings that DeepSpeed has through its own API here.

    It has to be ``cpu=False``, also on a machine without another device: with ``cpu=True`` the plugin is not looked at.
    """

    def wrap(self) -> None:
        """``prepare``, whose result is DeepSpeed's engine."""
        plugin = DeepSpeedPlugin(hf_ds_config=settings(self.config, self.arguments["stage"]))
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = MODELS[self.config.model].micro_batch
        mixed = "bf16" if self.config.precision == "bf16-mixed" else "no"
        self.accelerator = Accelerator(mixed_precision=mixed, deepspeed_plugin=plugin)
        bare = build_optimizer(self.module.parameters(), self.config)
        prepared: Any = self.accelerator.prepare(self.module, bare)
        self.engine = prepared[0]
        self.model, self.optimizer = self._forward, self.engine.optimizer

    def save(self, path: Path) -> None:
        """Accelerate's ``save_state``."""
        self.accelerator.save_state(str(path))

    def load(self, path: Path) -> None:
        """Accelerate's ``load_state``."""
        self.accelerator.load_state(str(path))
