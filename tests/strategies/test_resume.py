"""Fits that go on from a checkpoint of the middle of an epoch are, bit for bit, those that were never interrupted."""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from models import FEATURES, OUTPUTS, Net, trainer, values
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    get_worker_info,
)
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, MinMetric

from harness import Ranks
from lightning_accel.strategies import AccelDDPStrategy
from rows import everyday

SIZE = 48
"""Samples of an epoch."""
BATCH = 12
"""Samples of a batch, over all ranks."""


class Augmented(Dataset[tuple[int, Tensor, Tensor]]):
    """Samples that are changed at random as they are loaded, by all three generators; within workers by none."""

    def __init__(self, size: int = SIZE) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
        self.y = torch.randn(size, OUTPUTS, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        noise = torch.zeros(FEATURES)
        if get_worker_info() is None:
            noise = torch.rand(FEATURES) + random.random() + float(np.random.rand())
        return index, self.x[index] + 0.1 * noise, self.y[index]


class Plain(Augmented):
    """Samples as they are: a loader with a state of its own knows nothing of random numbers that samples draw."""

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, self.x[index], self.y[index]


class Drawing(Augmented):
    """A dataset whose transform has a generator."""

    def __init__(self) -> None:
        super().__init__(SIZE // 2)
        self.transforms = [functools.partial(torch.rand, FEATURES), Noise()]

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, self.x[index] + self.transforms[1](), self.y[index]


class Noise:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self) -> Tensor:
        return torch.rand(FEATURES, generator=self.generator)


class Numbers(IterableDataset[tuple[int, Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        data = Plain()
        return iter(data[index] for index in range(SIZE))


class Backwards(Sampler[int]):
    """An order of the user's own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE - 1, -1, -1))

    def __len__(self) -> int:
        return SIZE


class Batches:
    """Lists of samples: a loader that torch knows nothing of."""

    def __init__(self, batch_size: int) -> None:
        self.batches = list(DataLoader(Plain(), batch_size=batch_size))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def shuffled(batch_size: int, **options: Any) -> DataLoader[Any]:
    """A loader that Lightning gives a distributed sampler where there are several ranks."""
    return DataLoader(Augmented(), batch_size=batch_size, shuffle=True, **options)


def stateful(batch_size: int, **options: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    return torchdata.StatefulDataLoader(Plain(), batch_size=batch_size, shuffle=True, **options)


LOADERS: dict[str, Callable[[int], Any]] = {
    "shuffled": shuffled,
    "workers": lambda size: shuffled(size, num_workers=2),
    "persistent workers": lambda size: shuffled(size, num_workers=1, persistent_workers=True),
    "batch sampler": lambda size: DataLoader(Plain(), batch_sampler=BatchSampler(RandomSampler(Plain()), size, False)),
    "in order": lambda size: DataLoader(Plain(), batch_size=size),
    "less data": lambda size: DataLoader(Plain(24), batch_size=size, shuffle=True),
    "own generator": lambda size: shuffled(size, generator=torch.Generator().manual_seed(3)),
    "iterable": lambda size: DataLoader(Numbers(), batch_size=size),
    "the user's sampler": lambda size: DataLoader(Augmented(), batch_size=size, sampler=Backwards()),
    "no DataLoader": lambda size: Batches(size),
    "dictionary": lambda size: {"a": shuffled(size), "b": DataLoader(Plain(24), batch_size=size // 2, shuffle=True)},
    "shortest of two": lambda size: CombinedLoader({"a": shuffled(size), "b": shuffled(size // 2)}, "min_size"),
    "longest of two": lambda size: CombinedLoader({"a": shuffled(size), "b": shuffled(2 * size)}, "max_size_cycle"),
    "generators within": lambda size: DataLoader(ConcatDataset([Drawing(), Drawing()]), batch_size=size),
    "stateful": stateful,
    "stateful with workers": lambda size: stateful(size, num_workers=2),
    "stateful with persistent workers": lambda size: stateful(size, num_workers=1, persistent_workers=True),
}


KINDS = [kind for kind in LOADERS if kind not in ("shuffled", "in order", "less data", "batch sampler")]


class Noisy(pl.LightningModule):
    """A net with dropout, which notes the batches that it sees, what it logs of epochs, and where it was saved."""

    def __init__(self, scheduler: str = "step") -> None:
        super().__init__()
        self.scheduler = scheduler
        self.net, self.dropout = Net(), nn.Dropout(0.3)
        self.logged, self.pair, self.own = MeanMetric(), MetricCollection([MinMetric(), MaxMetric()]), CatMetric()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        parts = [part for part in parts if part is not None]
        self.seen.append((self.current_epoch, batch_idx, [part[0].tolist() for part in parts]))
        losses = [nn.functional.mse_loss(self.net(self.dropout(x)), y) for _, x, y in parts]
        loss = torch.stack(losses).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=batch_idx + 1)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx=max, batch_size=1, sync_dist=True)
        self.logged.update(loss.detach())
        self.log("metric", self.logged, on_step=False, on_epoch=True, batch_size=1)
        self.pair.update(loss.detach())
        self.own.update(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        drawn = torch.rand(())
        self.seen.append(("validation", self.current_epoch, batch_idx, drawn.item()))
        self.log("drawn", drawn)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=0, threshold=9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "drawn"}}
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class EpochsLogged(pl.Callback):
    """Notes what is known of an epoch of training when it is over."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        found |= {name: value.item() for name, value in pl_module.pair.compute().items()}
        pl_module.seen.append(("epoch", trainer.current_epoch, found, pl_module.own.compute().reshape(-1).tolist()))
        pl_module.pair.reset()
        pl_module.own.reset()


class SaveOnce(pl.Callback):
    """Saves within a hook, once, when so many batches of an epoch are over."""

    def __init__(self, path: Path, hook: str, epoch: int, batches: int | None) -> None:
        self.path, self.epoch, self.batches = path, epoch, batches
        self.is_done = False
        setattr(self, hook, self._save)

    def _save(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if not self.is_done and trainer.current_epoch == self.epoch and self.batches in (None, done):
            self.is_done = True
            pl_module.seen.append("saved")
            trainer.save_checkpoint(self.path)


Result = tuple[list[Any], dict[str, Tensor], tuple[int, int]]
"""What was seen, the parameters, and the epoch and the step at the end."""


def train(
    strategy: Any,
    *,
    ranks: int = 1,
    save: tuple[Path, str, int, int | None] | None = None,
    ckpt_path: Path | None = None,
    seed: int = 0,
    validate: bool = True,
    loaders: str = "shuffled",
    batch_size: int | None = None,
    scheduler: str = "step",
    factors: dict[int, int] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **arguments: Any,
) -> Result:
    """Train a Noisy; its random numbers begin with ``seed`` and this rank."""
    if batch_size is None:
        batch_size = BATCH // ranks
    torch.manual_seed(seed)
    train_loader = LOADERS[loaders](batch_size)
    seed += 100 * int(os.environ.get("RANK", 0))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    module = Noisy(scheduler)
    used = trainer(
        strategy,
        devices=ranks,
        callbacks=[
            EpochsLogged(),
            *callbacks,
            *([] if save is None else [SaveOnce(*save)]),
            *([] if factors is None else [GradientAccumulationScheduler(factors)]),
        ],
        **{"max_epochs": 3, "gradient_clip_val": 0.5, **arguments},
    )
    val_loader = DataLoader(Augmented(), batch_size=2 * batch_size) if validate else None
    used.fit(module, train_loader, val_loader, ckpt_path=ckpt_path)
    return module.seen, values(module), (used.current_epoch, used.global_step)


def batches_of(result: Result) -> list[Any]:
    """What was seen, without what was logged of epochs."""
    return [entry for entry in result[0] if entry[0] != "epoch"]


def assert_goes_on(whole: Result, resumed: Result, repeated: int = 0) -> None:
    """The same samples and validations come, and everything is the same bit by bit.

    Args:
        whole: Of the run that has saved and was not interrupted.
        resumed: Of the one that went on.
        repeated: How many batches may come again: gradients that wait for a step are not saved.

    """
    at = whole[0].index("saved")
    seen = whole[0][:at] + whole[0][at + 1 :]
    count = len(resumed[0])
    assert count >= len(seen) - at
    assert resumed[0] == seen[len(seen) - count :]
    again = [entry for entry in seen[len(seen) - count : at] if isinstance(entry[0], int)]
    assert len(again) <= repeated
    assert resumed[2] == whole[2]
    assert resumed[1].keys() == whole[1].keys()
    for name, value in whole[1].items():
        assert torch.equal(resumed[1][name], value), name


# ------------------------------------------------------------------------- one rank, all hooks

HOOKS = [
    ("on_train_batch_end", 1, 2),
    ("on_train_batch_end", 1, 3),
    ("on_train_batch_end", 1, 4),
    ("on_train_batch_start", 1, 2),
    ("on_before_optimizer_step", 1, 2),
    ("on_train_epoch_end", 1, 4),
    ("on_train_epoch_start", 1, None),
    ("on_validation_start", 1, 4),
    ("on_validation_batch_end", 1, 2),
    ("on_validation_end", 1, 2),
    ("on_validation_end", 1, 4),
    ("on_train_start", 0, 0),
    ("on_train_epoch_start", 0, None),
    ("on_fit_start", 0, None),
    ("on_fit_end", 3, None),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no validation": {"validate": False},
    "two validations": {"val_check_interval": 0.5},
    "max_steps": {"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 0.5},
    "accumulation": {"accumulate_grad_batches": 3},
    "limited": {"limit_train_batches": 3},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1},
    "several epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "plateau": {"scheduler": "plateau"},
    "own generator": {"loaders": "own generator", "use_distributed_sampler": False},
    "workers": {"loaders": "workers"},
    "persistent workers": {"loaders": "persistent workers"},
}


def assert_exact(path: Path, hook: str, epoch: int, batches: int | None, **settings: Any) -> None:
    whole = train("accel_ddp", save=(path, hook, epoch, batches), **settings)
    if not path.exists():
        pytest.skip(f"{hook} is not called then")
    window = settings.get("accumulate_grad_batches", 1)
    repeated = window if hook == "on_before_optimizer_step" else window - 1
    assert_goes_on(whole, train("accel_ddp", ckpt_path=path, seed=5, **settings), repeated)


@pytest.mark.parametrize(("hook", "epoch", "batches"), HOOKS)
def test_a_checkpoint_of_any_hook_goes_on_exactly(hook: str, epoch: int, batches: int | None, tmp_path: Path) -> None:
    assert_exact(tmp_path / "saved.ckpt", hook, epoch, batches, val_check_interval=0.5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_checkpoint_of_any_setting_goes_on_exactly(setting: str, tmp_path: Path) -> None:
    assert_exact(tmp_path / "saved.ckpt", "on_train_batch_end", 1, 2, **SETTINGS[setting])


@pytest.mark.matrix
@pytest.mark.parametrize(("hook", "epoch", "batches"), [HOOKS[index] for index in (2, 3, 5, 10, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_loaders(kind: str, hook: str, epoch: int, batches: int | None, tmp_path: Path) -> None:
    assert_exact(tmp_path / "saved.ckpt", hook, epoch, batches, loaders=kind, val_check_interval=2)


@pytest.mark.matrix
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("hook", "epoch", "batches"), HOOKS)
def test_all_hooks_and_settings(hook: str, epoch: int, batches: int | None, setting: str, tmp_path: Path) -> None:
    assert_exact(tmp_path / "saved.ckpt", hook, epoch, batches, **SETTINGS[setting])


# ------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize("row", everyday(["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]))
@pytest.mark.parametrize("setting", ["two validations", "accumulation"])
def test_ranks_go_on_exactly(ranks2: Ranks, row: str, setting: str, tmp_path: Path) -> None:
    settings = {"ranks": 2, **SETTINGS[setting]}
    save = (tmp_path / "saved.ckpt", "on_train_batch_end", 1, 2)
    whole = ranks2.run(train, f"accel_{row}", save=save, **settings)
    # Ranks have random numbers of their own: these of dropout, and those of what they load.
    resumed = ranks2.run(train, f"accel_{row}", ckpt_path=save[0], seed=5, **settings)
    for before, after in zip(whole, resumed, strict=True):
        assert_goes_on(before, after, settings.get("accumulate_grad_batches", 1) - 1)


def full_in_ddp(path: Path, **settings: Any) -> Result:
    return train(AccelDDPStrategy(state_dict_type="full"), save=(path, "on_train_batch_end", 1, 3), ranks=2, **settings)


def test_a_whole_file_knows_of_all_ranks(ranks2: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    whole = ranks2.run(full_in_ddp, path)
    assert torch.load(path, weights_only=True)["lightning_accel"]["world_size"] == 2
    for before, after in zip(whole, ranks2.run(train, "accel_fsdp", ranks=2, ckpt_path=path, seed=5), strict=True):
        assert batches_of(after) == batches_of(before)[batches_of(before).index("saved") + 1 :]


# ------------------------------------------------------------------------- other numbers of ranks


def train_on(ranks: int, **settings: Any) -> Result:
    """With the same global batch."""
    return train("accel_zero2", ranks=ranks, validate=False, **settings)


def samples(results: list[Result], epoch: int, batch: int | None = None) -> Counter[int]:
    """What all ranks have seen of an epoch, or of one of its batches."""
    trained = [entry for seen, _, _ in results for entry in seen if entry[0] == epoch]
    return Counter(index for _, i, parts in trained if batch in (None, i) for part in parts for index in part)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1), (1, 2)])
def test_no_sample_of_the_epoch_is_repeated_or_lost(
    ranks_of: Callable[[int], Ranks], before: int, after: int, tmp_path: Path
) -> None:
    path = tmp_path / "saved.ckpt"
    first = ranks_of(before).run(train_on, before, save=(path, "on_train_batch_end", 1, 1), max_epochs=2)
    second = ranks_of(after).run(train_on, after, ckpt_path=path, seed=5, max_epochs=3)
    assert samples(first, 1, 0) + samples(second, 1) == Counter(range(SIZE))
    assert samples(second, 2) == Counter(range(SIZE))
    assert {result[2] for result in second} == {(3, 12)}
    # The order is the one of the run that was not interrupted: batches are of the same samples.
    for batch in range(1, 4):
        assert samples(second, 1, batch) == samples(first, 1, batch)


def change_ranks_twice(folder: Path, ranks: int, batches: int | None) -> Result:
    """Go on from the file that other ranks have left, and stop after so many batches of epoch 1."""
    files = sorted(folder.iterdir())
    save = None if batches is None else (folder / f"{len(files)}.ckpt", "on_train_batch_end", 1, batches)
    return train_on(ranks, save=save, ckpt_path=files[-1] if files else None, seed=len(files), max_epochs=2)


def test_a_run_may_change_its_ranks_within_an_epoch_as_often_as_it_likes(
    ranks2: Ranks, ranks3: Ranks, tmp_path: Path
) -> None:
    first = ranks2.run(change_ranks_twice, tmp_path, 2, 1)
    second = ranks3.run(change_ranks_twice, tmp_path, 3, 2)
    third = ranks2.run(change_ranks_twice, tmp_path, 2, None)
    assert samples(first, 1, 0) + samples(second, 1, 1) + samples(third, 1) == Counter(range(SIZE))


# ------------------------------------------------------------------------- all kinds of loaders


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_of_any_kind_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    settings = {"loaders": kind, "max_epochs": 3}
    assert_exact(tmp_path / "saved.ckpt", "on_train_batch_end", 1, 2, **settings)


@pytest.mark.parametrize("kind", ["dictionary", "stateful"])
def test_a_loader_of_any_kind_goes_on_exactly_on_ranks(ranks2: Ranks, kind: str, tmp_path: Path) -> None:
    settings = {"ranks": 2, "loaders": kind}
    save = (tmp_path / "saved.ckpt", "on_train_batch_end", 1, 1)
    whole = ranks2.run(train, "accel_zero2", save=save, **settings)
    for before, after in zip(
        whole, ranks2.run(train, "accel_zero2", ckpt_path=save[0], seed=5, **settings), strict=True
    ):
        assert_goes_on(before, after)


def test_a_loader_with_a_state_goes_back_to_the_first_micro_batch(tmp_path: Path) -> None:
    settings = {"loaders": "stateful", "accumulate_grad_batches": 3}
    assert_exact(tmp_path / "saved.ckpt", "on_train_batch_end", 1, 2, **settings)


@pytest.mark.parametrize("kind", ["workers", "stateful", "stateful with workers"])
def test_loaders_of_any_kind_are_shared_by_other_ranks(kind: str, ranks2: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    first = train_on(1, save=(path, "on_train_batch_end", 1, 1), loaders=kind, max_epochs=2)
    second = ranks2.run(train_on, 2, ckpt_path=path, loaders=kind, max_epochs=2)
    assert samples([first], 1, 0) + samples(second, 1) == Counter(range(SIZE))
    for batch in range(1, 4):
        assert samples(second, 1, batch) == samples([first], 1, batch)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_schedulers_that_follow_a_metric_go_on_exactly(hook: str, tmp_path: Path) -> None:
    assert_exact(tmp_path / "saved.ckpt", hook, 1, 4, scheduler="plateau")


def test_a_checkpoint_of_the_last_batch_has_what_early_stopping_looks_at(tmp_path: Path) -> None:
    """Of the whole epoch, although no batch of it is left."""
    path = tmp_path / "saved.ckpt"
    whole, resumed = (
        EarlyStopping("loss_epoch", patience=9, check_on_train_epoch_end=True, check_finite=True) for _ in range(2)
    )
    train("accel_ddp", save=(path, "on_train_batch_end", 1, 4), callbacks=[whole], validate=False)
    train("accel_ddp", ckpt_path=path, seed=5, callbacks=[resumed], validate=False)
    assert resumed.state_dict() == whole.state_dict()
    assert 0 < resumed.best_score < 10


def test_an_accumulation_that_changes_with_epochs_goes_on_exactly(tmp_path: Path) -> None:
    assert_exact(tmp_path / "saved.ckpt", "on_train_batch_end", 1, 2, factors={0: 1, 1: 2})


# ------------------------------------------------------------------------- what nobody can go on from


def saved_within_an_epoch(path: Path, **settings: Any) -> Path:
    train("accel_ddp", save=(path / "saved.ckpt", "on_train_batch_end", 1, 2), **settings)
    return path / "saved.ckpt"


def test_a_sampler_whose_order_nobody_knows_cannot_be_shared_anew(ranks2: Ranks, tmp_path: Path) -> None:
    path = saved_within_an_epoch(tmp_path, loaders="iterable")
    for kind, message in ranks2.run_expecting_error(train_on, 2, ckpt_path=path, loaders="iterable"):
        assert kind == "ValueError"
        assert "Expected 1 ranks with batch_size=12" in message
        assert "Resume on 1 ranks with batch_size=12, or from a checkpoint of the end of an epoch" in message


def test_another_batch_size_of_a_users_batch_sampler_is_an_error(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_distributed_sampler": False, "loaders": "batch sampler"}
    path = saved_within_an_epoch(tmp_path, **settings)
    with pytest.raises(ValueError, match="Expected 1 ranks with batch_size=12.* got 1 with batch_size=6"):
        train("accel_ddp", ckpt_path=path, batch_size=6, **settings)


def test_another_number_of_loaders_is_an_error(tmp_path: Path) -> None:
    path = saved_within_an_epoch(tmp_path)
    with pytest.raises(ValueError, match="Expected 1 training loaders, .* got 2"):
        train("accel_ddp", ckpt_path=path, loaders="dictionary")


def test_other_data_is_warned_of(tmp_path: Path) -> None:
    path = saved_within_an_epoch(tmp_path)
    with pytest.warns(UserWarning, match="in the middle of an epoch of 48 samples .*now there are 24"):
        train("accel_ddp", ckpt_path=path, loaders="less data")


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    train(AccelDDPStrategy(state_dict_type="full"), save=(path, "on_train_batch_end", 1, 2))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_accel"]["version"] += 1
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="version 1 or before, got version 2.*Update this package"):
        train("accel_ddp", ckpt_path=path)


def test_a_checkpoint_of_stock_lightning_skips_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    settings: dict[str, Any] = {"loaders": "in order", "validate": False, "use_distributed_sampler": False}
    whole = train("auto", save=(path, "on_train_batch_end", 1, 2), **settings)
    with pytest.warns(UserWarning, match="Each rank skips as many batches of its own order"):
        resumed = train("accel_ddp", ckpt_path=path, **settings)
    assert batches_of(resumed) == batches_of(whole)[batches_of(whole).index("saved") + 1 :]


def test_stock_lightning_goes_on_from_our_checkpoints(tmp_path: Path) -> None:
    path = saved_within_an_epoch(tmp_path, validate=False)
    _, _, end = train("auto", ckpt_path=path, validate=False)
    assert end == (3, 12)


def test_weights_only_checkpoints_say_nothing_of_it(tmp_path: Path) -> None:
    module = Noisy()
    used = trainer(AccelDDPStrategy(state_dict_type="full"), devices=1, max_epochs=1)
    used.fit(module, shuffled(BATCH))
    used.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "lightning_accel" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
