"""Train a small GPT on the source of Python's standard library with any of Lightning's strategies.

The model and the data module know nothing of lightning_accel. Importing it registers its strategies, so the one line
that differs from stock Lightning is the import.

    python examples/train_lm.py                                   # two CPU ranks, about two minutes
    python examples/train_lm.py --strategy accel_ddp --devices 4
    python examples/train_lm.py --resume --max-steps 2000         # go on from the last checkpoint
"""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import (
    data_module,
    describe_memory,
    finish,
    label,
    language_model_parser,
    model_arguments,
    parse_language_model,
    positive,
    sample_text,
    share_cores,
)
from gpt import LitGPT
from learning_curve import LearningCurve
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import StrategyRegistry
from stdlib_text import StdlibText
from torch import Tensor

import lightning_accel  # noqa: F401  registers the strategies

CHECKPOINTS = "checkpoints"


class Recorder(L.Callback):
    """Keeps the learning curve, measures tokens per second, and reports at the end.

    Args:
        out: Folder for ``metrics.csv`` and ``curve.png``.
        title: What runs.
        ranks_here: Ranks on this machine, which share its cores.
        data: Knows the tokens of the sample text.
        generate: Tokens of sample text to write at the end.
        stop_at: The step after which to stop, if that is not where the schedule ends.
    """

    def __init__(
        self, out: Path, title: str, ranks_here: int, data: StdlibText, generate: int, stop_at: int | None
    ) -> None:
        self.out = out
        self.title = title
        self.ranks_here = ranks_here
        self.data = data
        self.generate = generate
        self.stop_at = stop_at
        self.curve = LearningCurve()
        self.started = False
        self.mark: float | None = None  # when the current step began
        self.lr = 0.0
        self.losses: list[Tensor] = []  # of the current step's micro-batches

    def state_dict(self) -> dict[str, Any]:
        return self.curve.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve.load_state_dict(state_dict)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        share_cores(self.ranks_here)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = True
        if trainer.global_step and trainer.is_global_zero:
            print(f"resumed at step {trainer.global_step}")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, i: int) -> None:
        if self.mark is None:
            self.mark = time.perf_counter()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # the schedule moves on before on_train_batch_end

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, i: int
    ) -> None:
        # Lightning has divided the loss by the number of micro-batches already, so their sum is the step's mean.
        self.losses.append(outputs["loss"])
        if len(self.losses) < trainer.accumulate_grad_batches:
            return
        loss = trainer.strategy.reduce(torch.stack(self.losses).sum(), reduce_op="mean")
        tokens = trainer.accumulate_grad_batches * trainer.world_size * batch[:, 1:].numel()
        self.losses.clear()
        now = time.perf_counter()
        speed = self.curve.trained(trainer.global_step, tokens, now - (self.mark or now), self.lr, float(loss))
        self.mark = now
        pl_module.log("tokens/s", speed, prog_bar=True)
        if trainer.global_step >= (self.stop_at or trainer.max_steps):
            trainer.should_stop = True  # makes Lightning validate, and so save, after the last step whatever its number

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mark = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's sanity check validates before the first step: that is where the curve begins.
        self.curve.validated(trainer.global_step, float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        details = []
        # The engine is closed when training is torn down, so this is the last moment to ask it.
        engine = getattr(trainer.strategy, "engine", None)
        if engine is not None:
            details.append(describe_memory(engine.report(), pl_module.all_gather))
        if self.generate:
            details.append(sample_text(pl_module, self.data, self.generate, pl_module.device))
        if trainer.is_global_zero:
            pl_module.print(finish(self.curve, self.title, self.out, details))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.started and trainer.is_global_zero:
            print(f"the checkpoint is at step {trainer.global_step} already: raise --max-steps to train on")


def main() -> None:
    """Read the command line and train."""
    parser = language_model_parser(
        "Train a small GPT on the source of Python's standard library, under any Lightning strategy.",
        StrategyRegistry.available_strategies(),
        "runs/train_lm",
    )
    parser.add_argument("--stop-at", type=positive, metavar="STEP", help="save and stop here, as if interrupted")
    args = parse_language_model(parser, f"{CHECKPOINTS}/last.ckpt")
    share_cores(args.devices)
    L.seed_everything(args.seed, verbose=False)
    model = LitGPT(**model_arguments(args), lr=args.lr, weight_decay=args.weight_decay, warmup=args.warmup)
    data = data_module(args)
    recorder = Recorder(args.out, label(args, model), args.devices, data, args.generate, args.stop_at)
    # With a version counter, a second run into the same folder would write last-v1.ckpt and leave last.ckpt, which
    # --resume reads, as the first run's.
    checkpoints = ModelCheckpoint(
        args.out / CHECKPOINTS, filename="{step}", save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_steps=args.max_steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip or None,
        val_check_interval=args.val_every * args.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        logger=False,
        callbacks=[recorder, checkpoints, TQDMProgressBar(refresh_rate=10)],
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=args.resume)


if __name__ == "__main__":
    main()
