"""What the ranks of `test_accel_deepspeed_pipeline` do: a model that is a pipeline of two stages."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from deepspeed_jobs import CLIPPING, import_quietly, trainer
from divided_deepspeed_jobs import TOKENS, WIDTH, Block, data, new_optimizer
from torch import Tensor, nn

MICRO_BATCHES = 2
STAGES = (0, 1)


def layers() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return [nn.Embedding(TOKENS, WIDTH), Block(), Block(), nn.Linear(WIDTH, TOKENS)]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Alone(pl.LightningModule):
    """The same without a pipeline; notes its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.samples: list[list[int]] = []
        self.net: Any = None

    def configure_model(self) -> None:
        self.net = self.net or nn.Sequential(*layers())

    def loss(self, batch: Any) -> Tensor:
        _, tokens = batch
        return loss_of(self.net(tokens[:, :-1]), tokens[:, 1:])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.samples.append(batch[0].tolist())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.loss(batch).item())

    def configure_optimizers(self) -> Any:
        optimizer = new_optimizer(self)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Piped(Alone):
    def configure_model(self) -> None:
        from deepspeed.pipe import PipelineModule

        self.net = self.net or PipelineModule(layers(), num_stages=2, loss_fn=loss_of)

    def loss(self, batch: Any) -> Tensor:
        _, tokens = batch
        return self.net((tokens[:, :-1], tokens[:, 1:]))


class Twice(Piped):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + self.loss(batch)


class Outside(Piped):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class ByHand(Piped):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def fitted(module: Alone, strategy: Any, replicas: int = 1, ckpt_path: str | None = None, **arguments: Any) -> Any:
    devices = dist.get_world_size() if dist.is_initialized() else 1
    settings = {"devices": devices, "accumulate_grad_batches": 1, "use_distributed_sampler": devices > 1}
    used = trainer(strategy, **{**settings, **arguments})
    used.fit(module, data(replicas), data(replicas), ckpt_path=ckpt_path)
    return {
        "losses": module.losses,
        "validated": module.validated,
        "samples": module.samples,
        "steps": used.global_step,
        "rate": used.lr_scheduler_configs[0].scheduler.get_last_lr(),
        "values": {name: value.detach().clone() for name, value in module.net.state_dict().items()},
    }


def piped(stage: int = 1, **file: Any) -> Any:
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    told = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": MICRO_BATCHES}
    return AccelDeepSpeedStrategy(config={**told, **file})


def stopped_and_continued(stage: int, folder: str, replicas: int) -> dict[str, Any]:
    place = f"{folder}/{stage}"
    keeper = pl.callbacks.ModelCheckpoint(place, "{step}", every_n_epochs=1, save_top_k=-1)
    saved = {"enable_checkpointing": True, "callbacks": [keeper]}
    found: dict[str, Any] = fitted(Piped(), piped(stage, gradient_clipping=CLIPPING), replicas, **saved)
    again = fitted(Piped(), piped(stage), replicas, ckpt_path=f"{place}/step=10.ckpt")
    return {**found, "continued": again["losses"], "values continued": again["values"]}


def refused(module: Alone, strategy: Any, **arguments: Any) -> str:
    try:
        fitted(module, strategy, max_epochs=1, **arguments)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


def validated_alone() -> str:
    try:
        trainer(piped()).validate(Piped(), data(1))
    except ValueError as error:
        return str(error)
    return "accepted"


def everything(folder: str) -> dict[str, Any]:
    import_quietly()
    ranks = dist.get_world_size()
    found: dict[str, Any] = {}
    for stage in STAGES if ranks == 2 else (1,):
        found[f"stage {stage}"] = stopped_and_continued(stage, folder, ranks // 2)
    if ranks == 2:
        found["refused"] = {
            "stage": refused(Piped(), piped(2)),
            "outside": refused(Outside(), piped()),
            "by hand": refused(ByHand(), piped(), gradient_clip_val=None),
            "accumulates": refused(Piped(), piped(), accumulate_grad_batches=2),
            "twice": refused(Twice(), piped()),
            "batches": refused(Piped(), piped(gradient_accumulation_steps=3)),
            "validate": validated_alone(),
        }
    return found
