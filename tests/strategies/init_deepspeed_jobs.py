"""What the ranks of `test_accel_deepspeed_init` do: models that are made in parts, at stage 3."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from deepspeed_jobs import ACCUMULATE, CLIPPING, STEPS, import_quietly, trainer
from divided_deepspeed_jobs import Language, Speaker, data, loss_of, new_optimizer
from lightning.fabric import Fabric
from torch import nn


def bytes_of(net: nn.Module) -> tuple[int, int]:
    """What rests on this rank, and what its part of each parameter would be."""
    held = [*net.parameters(), *(one.ds_tensor for one in net.parameters() if hasattr(one, "ds_tensor"))]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held}
    rests = sum(storages.values())
    whole = [getattr(one, "ds_numel", one.numel()) for one in net.parameters()]
    return rests, sum(-(-count // 2) * 4 for count in whole)


class Made(Speaker):
    """Makes its network when the strategy is there; `net` is None before."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Language()
            self.bytes = bytes_of(self.net)


class Validated(Made):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen, self.last = loss_of(self.net, batch[1]).item(), batch[1]


def fitted(strategy: Any, replicas: int, ckpt_path: str | None = None, **arguments: Any) -> Any:
    module = Validated()
    used = trainer(strategy, use_distributed_sampler=replicas > 1, **arguments)
    used.fit(module, data(replicas), data(replicas), ckpt_path=ckpt_path)
    return module


def evaluated(module: Validated, strategy: Any) -> tuple[float, float]:
    """The loss of the last batch, and what it is when all parameters were joined."""
    from deepspeed.runtime.zero import GatheredParameters

    trainer(strategy).validate(module, data(2), verbose=False)
    with GatheredParameters(list(module.parameters())), torch.no_grad():
        return module.seen, loss_of(module.net, module.last).item()


def fabric_loop(strategy: Any, replicas: int) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=replicas, strategy=strategy)
    fabric.launch()
    with fabric.init_module():
        net = Language()
    found: dict[str, Any] = {"bytes": bytes_of(net), "losses": []}
    model, optimizer = fabric.setup(net, new_optimizer(net))
    loader = fabric.setup_dataloaders(data(replicas), use_distributed_sampler=replicas > 1)
    for step in range(STEPS):
        loader.sampler.set_epoch(step)
        for _, (_, tokens) in zip(range(ACCUMULATE), loader, strict=False):
            loss = loss_of(model, tokens)
            fabric.backward(loss / ACCUMULATE)
            found["losses"].append(loss.item())
        if replicas == 1:
            fabric.clip_gradients(model, optimizer, max_norm=CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
    return found


def everything(folder: str) -> dict[str, Any]:
    import_quietly()
    from lightning_accel.strategies import AccelDeepSpeedStrategy, fabric

    keeper = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_epochs=1, save_top_k=-1)
    module = fitted(AccelDeepSpeedStrategy(stage=3), 2, enable_checkpointing=True, callbacks=[keeper])
    continued = fitted(AccelDeepSpeedStrategy(stage=3), 2, f"{folder}/step=9.ckpt")
    found = {
        "bytes": module.bytes,
        "losses": list(module.losses),
        "continued": continued.losses,
        "validated": module.seen,
        "evaluated": [evaluated(module, AccelDeepSpeedStrategy(stage=stage)) for stage in (3, 2)],
        "whole": fitted(AccelDeepSpeedStrategy(stage=2), 2).bytes,
    }
    before = len(module.losses)
    trainer(AccelDeepSpeedStrategy(stage=3), max_steps=1).fit(module, data(2))  # the same module once more
    found["again"] = module.losses[before]
    strategy = fabric.AccelDeepSpeedStrategy(
        stage=3, config={"zero_optimization": {"stage": 3}, "gradient_clipping": CLIPPING}
    )
    found["fabric"] = fabric_loop(strategy, 2)
    torch.distributed.barrier()
    return found
