"""What the ranks of `test_accel_deepspeed_only` do: what only DeepSpeed's own engine has."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from deepspeed_jobs import BATCHES, CLIPPING, Float32, data, fitted, import_quietly, trainer
from models import FEATURES, OUTPUTS
from torch import Tensor, nn

LR, DECAY = 0.02, 0.1
ADAM: dict[str, Any] = {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY}}
LESS: dict[str, Any] = {"max_steps": 12}
"""Fewer steps than elsewhere: the kernels of these Adams round differently, and that adds up."""


class Adam(Float32):
    """Trained by torch's own."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=DECAY)


class FilesAdam(Float32):
    """Leaves the optimizer to the file: DeepSpeed takes the one that it has for offloaded state."""

    def configure_optimizers(self) -> Any:
        return None


class Recomputing(Adam):
    """Its blocks' activations are computed again, by DeepSpeed's own checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        for block in self.net.blocks:
            block.forward = partial(self._recomputed, block.forward)  # type: ignore[method-assign]

    def _recomputed(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        from deepspeed import checkpointing

        if not checkpointing.is_configured():
            checkpointing.configure(None)
        return checkpointing.checkpoint(partial(self._counted, forward), x)

    def _counted(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.calls += 1
        return forward(x)


def strategy(stage: int, optimizer: dict[str, Any] = ADAM, **zero: Any) -> Any:
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    return AccelDeepSpeedStrategy(config={"zero_optimization": {"stage": stage, **zero}, "optimizer": optimizer})


def alone() -> list[float]:
    losses: list[float] = fitted(Adam(), "auto", **LESS)["losses"]
    return losses


def losses_of(module: Float32, used: Any, **settings: Any) -> list[float]:
    losses: list[float] = fitted(module, used, **LESS, **settings)["losses"]
    return losses


def copies() -> list[float]:
    """A second copy of parameters, divided over two ranks."""
    import_quietly()
    return losses_of(Adam(), strategy(3, zero_hpz_partition_size=2), devices=torch.distributed.get_world_size())


def offloaded() -> dict[str, list[float]]:
    import_quietly()
    place = {"device": "cpu"}
    found = {f"stage {s}": losses_of(FilesAdam(), strategy(s, offload_optimizer=place)) for s in (1, 2, 3)}
    both = strategy(3, offload_optimizer=place, offload_param=place)
    return {**found, "parameters": losses_of(FilesAdam(), both)}


def recomputed(stage: int) -> tuple[list[float], int]:
    import_quietly()
    module = Recomputing()
    return losses_of(module, strategy(stage)), module.calls


class Wide(Float32):
    """Has a matrix of which two ranks have 2 MiB each: what is below 1 MiB, DeepSpeed keeps in memory.

    Notes its batches.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wide = nn.Sequential(nn.Linear(FEATURES, 1024), nn.Linear(1024, 1024), nn.Linear(1024, OUTPUTS))
        self.batches: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.wide(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return None


def in_files(folder: str, *, parameters: bool) -> dict[str, Any]:
    """Losses and values under the Trainer, those of DeepSpeed by itself in host memory, and what is said of files.

    Args:
        folder: For the files, and for a checkpoint.
        parameters: Also those rest in files, which they do in bfloat16.

    """
    import_quietly()
    adam = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": DECAY}}

    def zero(name: str) -> dict[str, Any]:
        place = {"device": "nvme", "nvme_path": f"{folder}/{name}"}
        offloaded = {"offload_param": {**place, "buffer_size": 2**21}} if parameters else {}
        return {"offload_optimizer": place, **offloaded}

    keeper = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_epochs=1, save_top_k=-1)
    precision = "bf16-mixed" if parameters else "32-true"
    settings: dict[str, Any] = {**LESS, "accumulate_grad_batches": 1, "enable_checkpointing": True}
    settings["precision"] = precision
    module, noting = Wide(), Files(Path(folder))
    fit = trainer(strategy(3, adam, **zero("ours")), callbacks=[noting, keeper], **settings)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit.fit(module, data())
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - its text is told
        trainer(strategy(3, adam, **zero("again")), **settings).fit(
            Wide(), data(), ckpt_path=f"{folder}/step={BATCHES}.ckpt"
        )
    in_memory = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    losses, values = bare(module.batches, {"stage": 3, **in_memory}, adam, bf16=parameters)
    theirs = torch.cat([value.double().flatten() for value in values.values()])
    ours = torch.cat([p.detach().to(values[name].dtype).double().flatten() for name, p in module.named_parameters()])
    return {
        "losses": module.losses,
        "bare": losses,
        "difference": float((ours - theirs).norm() / theirs.norm()),
        "files": noting.found,
        "warned": [str(warning.message) for warning in warned],
        "refused": str(refused.value),
    }


def bare(
    batches: list[Any], zero: dict[str, Any], optimizer: dict[str, Any], *, bf16: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of DeepSpeed's engine in a loop of one's own, and its parameters after that."""
    import deepspeed

    module, losses = Wide(), []
    told = {"zero_optimization": zero, "optimizer": optimizer, "gradient_clipping": CLIPPING, "bf16": {"enabled": bf16}}
    sizes = {"train_micro_batch_size_per_gpu": len(batches[0][1]), "gradient_accumulation_steps": 1}
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config={**told, **sizes}, dist_init_required=False
    )
    for _, x, y in batches:
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return losses, {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class Files(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = [str(path) for path in self.folder.rglob("*.swp") if path.stat().st_size]
