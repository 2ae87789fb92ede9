"""DeepSpeed's JSON behind Lightning: run by DeepSpeed's own engine (``accel_deepspeed``), or by ours."""

from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.peers.deepspeed_settings import settings
from benchmarks.peers.deepspeed_zero import held_by
from benchmarks.peers.fabric import FabricPeer
from benchmarks.peers.trainer import TrainerPeer
from lightning_accel.convert.deepspeed_files import find_deepspeed
from lightning_accel.strategies import AccelDeepSpeedStrategy, fabric


class TrainerDeepSpeed(TrainerPeer):
    """``Trainer(strategy=AccelDeepSpeedStrategy(config=...))``."""

    def __init__(self, stage: int) -> None:
        super().__init__("accel_deepspeed")
        self.arguments["stage"] = stage

    def strategy(self) -> AccelDeepSpeedStrategy:
        """DeepSpeed's engine with the settings that it has through its own API."""
        return AccelDeepSpeedStrategy(config=settings(self.config, self.arguments["stage"]))

    def load(self, path: Path) -> None:
        """What the strategy does for ``fit(ckpt_path=...)``, in the midst of a fit."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, AccelDeepSpeedStrategy)
        strategy.load_checkpoint(path / "checkpoint.ckpt", weights_only=True)
        folder = find_deepspeed(path / "checkpoint.ckpt")
        assert folder is not None
        strategy.run.load(folder, strict=True)

    def more(self) -> dict[str, list[Tensor]]:
        """What DeepSpeed holds out of sight."""
        return held_by(self.trainer.strategy.engine)  # type: ignore[attr-defined]


class FabricDeepSpeed(FabricPeer):
    """``Fabric(strategy=AccelDeepSpeedStrategy(config=...))``."""

    def __init__(self, stage: int) -> None:
        super().__init__("accel_deepspeed")
        self.arguments["stage"] = stage

    def strategy(self) -> fabric.AccelDeepSpeedStrategy:
        """DeepSpeed's engine with the settings that it has through its own API."""
        return fabric.AccelDeepSpeedStrategy(config=settings(self.config, self.arguments["stage"]))

    def settle(self) -> None:
        """Nothing: DeepSpeed's step waits for what it sends."""

    def more(self) -> dict[str, list[Tensor]]:
        """What DeepSpeed holds out of sight."""
        return held_by(self.wrapped._forward_module)

    def teardown(self) -> None:
        """Give the model back."""
        self.fabric.strategy.teardown()
        super().teardown()


class FabricFile(FabricPeer):
    """``Fabric(strategy=AccelZeROStrategy(config=...))``: our engine, told by the same file."""

    def __init__(self, stage: int) -> None:
        super().__init__("accel_zero")
        self.arguments["stage"] = stage

    def strategy(self) -> Any:
        """The row that the file's stage stands for."""
        return fabric.AccelZeROStrategy(config=settings(self.config, self.arguments["stage"]))
