"""What the ranks of `test_accel_deepspeed` do, all in one job: DeepSpeed keeps its process groups as long as a process.

Models are float32, as DeepSpeed's master values are.
"""

from __future__ import annotations

import gc
import importlib
import os
import weakref
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from models import Net, Regression, loader
from torch import Tensor, nn

STEPS, ACCUMULATE, CLIPPING = 20, 2, 0.3
BATCHES = 5  # an epoch: its third step has one batch only
STAGES = (0, 1, 2, 3)


class Float32(Regression):
    """Notes its losses and learning rates; SGD shows wrong scales of gradients, which Adam hides."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"optimizer": "SGD", **settings})
        self.net = Net(dtype=torch.float32)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data() -> Any:
    return loader(size=8 * BATCHES, dtype=torch.float32)


def trainer(strategy: Any, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer, without `MeanOfShortWindows`: short windows count as Lightning counts them."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "max_steps": STEPS,
        "accumulate_grad_batches": ACCUMULATE,
        "gradient_clip_val": CLIPPING,
    }
    quiet["devices"] = 1 if strategy == "auto" else 2
    return pl.Trainer(accelerator="cpu", strategy=strategy, **{**quiet, **arguments})


def fitted(module: Float32, strategy: Any, **arguments: Any) -> dict[str, Any]:
    """Losses and what became of the model."""
    used = trainer(strategy, **arguments)
    used.fit(module, data())
    return {
        "losses": module.losses,
        "values": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "steps": used.global_step,
    }


def import_quietly() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed")
    # A minute's compilation, for what gloo does as well.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


class Counts(pl.Callback):
    """How often DeepSpeed steps and clips, and anybody else does."""

    def __init__(self) -> None:
        self.found = dict.fromkeys(("steps", "clippings", "others", "backwards"), 0)

    def _wrap(self, owner: Any, name: str, key: str) -> None:
        inner = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.found[key] += 1
            return inner(*args, **kwargs)

        setattr(owner, name, counted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = trainer.strategy.engine  # type: ignore[attr-defined]
        self.told = (engine.gradient_clipping(), engine.gradient_accumulation_steps(), engine.train_batch_size())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = trainer.strategy.engine  # type: ignore[attr-defined]
        self._wrap(engine.basic_optimizer, "step", "steps")
        self._wrap(engine.optimizer, "unscale_and_clip_grads", "clippings")
        self._wrap(engine, "backward", "backwards")
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            self._wrap(trainer.strategy.precision_plugin, name, "others")


def counts() -> dict[str, Any]:
    counted = Counts()
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    fitted(Float32(), AccelDeepSpeedStrategy(stage=2), callbacks=[counted])
    return {**counted.found, "told": counted.told}


FILE: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": CLIPPING,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 6}},
}


class FromFile(Float32):
    """Leaves the optimizer and its schedule to the file."""

    def configure_optimizers(self) -> Any:
        return None


class FromFileWithSchedule(Float32):
    """Has an optimizer; the schedule is the file's."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class Adagrads(Float32):
    """Its optimizer has state from the beginning; groups and a schedule must reach it."""

    def configure_optimizers(self) -> Any:
        weights = [one for one in self.parameters() if one.dim() > 1]
        biases = [one for one in self.parameters() if one.dim() == 1]
        groups = [{"params": weights, "lr": 0.2}, {"params": biases}]
        optimizer = torch.optim.Adagrad(groups, lr=0.02)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def by_adagrad(stage: int, folder: str) -> dict[str, Any]:
    """Losses in one go, and after a checkpoint at step 9."""
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    place = f"{folder}/adagrad {stage}"
    keeper = pl.callbacks.ModelCheckpoint(place, "{step}", every_n_epochs=1, save_top_k=-1)
    found = fitted(Adagrads(), AccelDeepSpeedStrategy(stage=stage), enable_checkpointing=True, callbacks=[keeper])
    module = Adagrads()
    trainer(AccelDeepSpeedStrategy(stage=stage)).fit(module, data(), ckpt_path=f"{place}/step=9.ckpt")
    return {**found, "continued": module.losses}


def by_file(kind: type[Any], module: type[Float32]) -> list[float]:
    unsaid = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "limit_train_batches": 4}
    return fitted(module(), kind(config=FILE), **unsaid)["losses"]


class ByHand(Float32):
    """Adds two batches up, and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 1:
            optimizer.step()  # type: ignore[union-attr]
            self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]


def by_hand(strategy: Any) -> dict[str, Any]:
    settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "limit_train_batches": 4}
    return fitted(ByHand(), strategy, **settings)


class TakesBack(ByHand):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward(self.loss(batch))
        self.optimizers().zero_grad()  # type: ignore[union-attr]


class ClipsByHand(ByHand):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward(self.loss(batch))
        self.clip_gradients(self.optimizers(), 0.1)  # type: ignore[arg-type]


class TwoOptimizers(ByHand):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.first.parameters(), lr=0.1), torch.optim.SGD(self.net.last.parameters(), lr=1)]


class OwnClipping(Float32):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...


def refused(module: Float32, strategy: Any, **settings: Any) -> str:
    try:
        fitted(module, strategy, max_epochs=1, **settings)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


def refusals() -> dict[str, str]:
    from lightning_accel.strategies import AccelDeepSpeedStrategy as Strategy

    unset: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    return {
        "accumulation": refused(Float32(), Strategy(config=FILE), accumulate_grad_batches=4),
        "clipping": refused(Float32(), Strategy(config=FILE), gradient_clip_val=0.5),
        "by value": refused(Float32(), Strategy(), gradient_clip_algorithm="value"),
        "batches": refused(Float32(), Strategy(config={**FILE, "train_batch_size": 32})),
        "own clipping": refused(OwnClipping(), Strategy()),
        "float64": refused(Float32().double(), Strategy()),
        "two": refused(TwoOptimizers(), Strategy(), **unset),
        "none": refused(FromFile(), Strategy()),
        "by hand": refused(ByHand(), Strategy(config={"gradient_accumulation_steps": 2}), **unset),
        "took back": refused(TakesBack(), Strategy(), **unset),
        "clips by hand": refused(ClipsByHand(), Strategy(), **unset),
    }


def in_bf16(precision: str) -> dict[str, Any]:
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    module = Float32()
    told = fitted(module, AccelDeepSpeedStrategy(stage=3 if precision == "bf16-mixed" else 1), precision=precision)
    weight = module.net.first.weight.detach()
    told["dtype"] = str(weight.dtype)
    told["has master values"] = not torch.equal(weight.float(), weight.bfloat16().float())
    (test,) = trainer(AccelDeepSpeedStrategy(), precision=precision).test(module, data(), verbose=False)
    told["test"] = test["test_loss"]
    return told


class Watched(Float32):
    """What evaluation saw."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen = [*getattr(self, "seen", []), self.loss(batch).item()]


def evaluated(stage: int) -> dict[str, Any]:
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    def used() -> pl.Trainer:
        return trainer(AccelDeepSpeedStrategy(stage=stage), max_steps=3, num_sanity_val_steps=1)

    module = Watched()
    first = used()
    first.fit(module, data(), data())
    before = len(module.losses)
    _, x, y = next(iter(data()))
    first_loss = nn.functional.mse_loss(module(x), y).item()
    samples = data().dataset
    expected = nn.functional.mse_loss(module(samples.x), samples.y).item()
    predicted = used().predict(module, data())
    (test,) = used().test(module, data(), verbose=False)
    again = used()  # the same module once more
    again.fit(module, data())
    return {
        "validated": len(module.seen),
        "predicted": [tuple(part.shape) for part in predicted or []],
        "test": test["test_loss"],
        "expected": expected,
        "again": (module.losses[before], first_loss, again.global_step),
        "params": [type(one).__name__ for one in module.parameters() if one.numel() == 0],
        "hooks": sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules()),
    }


def stopped_and_continued(stage: int, folder: str) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from lightning_accel.convert import convert
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    place = f"{folder}/{stage}"
    keeper = pl.callbacks.ModelCheckpoint(place, "{step}", every_n_epochs=1, save_top_k=-1)
    saved: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [keeper]}
    whole = fitted(Float32(), AccelDeepSpeedStrategy(stage=stage), **saved)["losses"]
    found: dict[str, Any] = {"whole": whole, "files": sorted(os.listdir(place))}
    module = Float32()
    trainer(AccelDeepSpeedStrategy(stage=stage)).fit(module, data(), ckpt_path=f"{place}/step=9.ckpt")
    found["continued"] = module.losses
    module = Watched()
    used = trainer(AccelDeepSpeedStrategy(stage=stage))
    used.validate(module, data(), ckpt_path=f"{place}/step=9.ckpt", verbose=False)
    found["validated"] = {name: value.clone() for name, value in module.state_dict().items()}
    if dist.get_rank() == 0:
        convert(f"{place}/step=9.ckpt", f"{place}/converted.ckpt")
        found["converted"] = torch.load(f"{place}/converted.ckpt", weights_only=True)
        if stage:
            found["by deepspeed"] = dict(get_fp32_state_dict_from_zero_checkpoint(f"{place}/step=9.ckpt"))
    dist.barrier()
    module = Float32()
    trainer("accel_zero2").fit(module, data(), ckpt_path=f"{place}/converted.ckpt")
    found["by zero2"] = module.losses
    other = AccelDeepSpeedStrategy(stage=(stage + 1) % 4)
    try:
        trainer(other).fit(Float32(), data(), ckpt_path=f"{place}/step=9.ckpt")
    except ValueError as error:
        found["another stage"] = str(error)
    return found


def left_behind(stage: int) -> int:
    """How many of a Trainer and its models are there when nobody holds them any more."""
    from lightning_accel.strategies import AccelDeepSpeedStrategy

    used, module = trainer(AccelDeepSpeedStrategy(stage=stage), max_steps=3), Float32()
    left = [weakref.ref(used), weakref.ref(module), weakref.ref(module.net)]
    used.fit(module, data())
    del used, module
    gc.collect()
    return sum(reference() is not None for reference in left)


def everything(folder: str) -> dict[str, Any]:
    from lightning_accel.strategies import AccelDeepSpeedStrategy, AccelZeROStrategy

    import_quietly()
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"stage {stage}"] = fitted(Float32(), AccelDeepSpeedStrategy(stage=stage))
        found[f"by hand {stage}"] = by_hand(AccelDeepSpeedStrategy(stage=stage))
        found[f"saved {stage}"] = stopped_and_continued(stage, folder)
        found[f"adagrad {stage}"] = by_adagrad(stage, folder)
        found[f"left {stage}"] = left_behind(stage)
    found["counts"] = counts()
    for kind in (AccelDeepSpeedStrategy, AccelZeROStrategy):
        for module in (FromFile, FromFileWithSchedule):
            found[f"{kind.__name__} {module.__name__}"] = by_file(kind, module)
    for precision in ("bf16-mixed", "bf16-true"):
        found[precision] = in_bf16(precision)
    for stage in (2, 3):
        found[f"evaluated {stage}"] = evaluated(stage)
    found["refused"] = refusals()
    return found
