"""accel_auto for the Trainer: the row comes from a plan.

[Note: one rank plans]
Rank 0 simulates one training step under each row and tells the others which to take: batches of different ranks may
differ in shape, and no two ranks may take different rows. The batch is collated of the first samples of the training
data, in this process: no worker starts, no sampler is asked, and random numbers are as before afterwards.
"""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_accel.convert.sizes import parse_size
from lightning_accel.core import rng
from lightning_accel.core.placement import find_row
from lightning_accel.strategies.trainer import AccelStrategy

_ROWS = ("zero2", "fsdp_partial", "fsdp")
"""What is chosen from: rows that shard optimizer state, so that checkpoints are the same whichever it is."""
_SMALLEST = "fsdp"
"""The one that needs least memory: taken if there is no plan."""
_USABLE = 0.9
"""Of a device's free memory: its allocator cuts some to pieces, and kernels take some."""


class AccelAutoStrategy(AccelStrategy):
    """``accel_zero2``, ``accel_fsdp_partial`` or ``accel_fsdp``: whichever sends least of those that fit the memory.

    Before ``fit`` sets the model up, a plan is made as ``lightning_accel.plan`` makes it, for one batch of the training
    data, and a line says what was chosen and why. If no plan can be made (see there; also for data that cannot be
    indexed) a warning says why, and ``accel_fsdp`` is taken. If nothing fits,
    a warning says so, and what needs least memory is tried.

    Args:
        memory: What a rank has, in bytes or as ``"80GB"``. Default: nine tenths of what is free on its device; on the
            CPU the machine's memory, divided by the ranks on it.
        kwargs: See :class:`~lightning_accel.strategies.trainer.AccelStrategy`; without ``offload``.

    Raises:
        ValueError: If ``memory`` is no size, or there is an ``offload``, which plans know nothing of.

    """

    strategy_name = "accel_auto"

    def __init__(self, memory: int | str | None = None, **kwargs: Any) -> None:
        for name in ("offload", "offload_dir"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"Expected no {name} with accel_auto, which plans for the device's memory, got {kwargs[name]!r}."
                    " Name the strategy that is to offload, such as accel_zero2."
                )
        super().__init__(find_row(_SMALLEST), **kwargs)
        self._memory = None if memory is None else parse_size(memory)
        self._is_chosen = False

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and not self._is_chosen and not self._goes_on(fitting):
            # See [Note: one rank plans].
            self.row = find_row(self.broadcast(self._choose(trainer) if self.is_global_zero else _SMALLEST))
            self._checkpoints.row = self.row
            self._is_chosen = True
        super().setup(trainer)

    def _choose(self, trainer: pl.Trainer) -> str:
        """The name of the row to take."""
        from lightning_accel.planning import plan  # torch's fake tensors take a while to import

        assert self.model is not None
        before = rng.collect()
        try:
            found = plan(
                self.model,
                batch=_first_batch(trainer),
                precision=_PRECISIONS.get(str(self.precision_plugin.precision), self.precision_plugin.precision),
                ranks=self.world_size,
                memory=self._memory or self._available(),
                rows=_ROWS,
                # Of single modules: as if there was none, which takes more memory.
                checkpointing=self._options.activation_checkpointing is True,
                units=self._options.units,
                bucket_cap_mb=self._options.bucket_cap_mb,
            )
        except Exception as error:  # whatever the user's code raises where there are no values and no Trainer
            rank_zero_warn(
                f"accel_auto takes accel_{_SMALLEST}, which needs least memory, as it cannot plan for this model:"
                f" {type(error).__name__}: {error}"
            )
            return _SMALLEST
        finally:
            rng.restore(before)
        best = found.best
        if best is None:
            rank_zero_warn(f"accel_auto: {found.why()}")
            return min(found.rows, key=lambda row: row.peak_bytes).row
        rank_zero_info(f"accel_auto takes {found.why()}")
        return best.row

    def _available(self) -> int:
        """Bytes that this rank may take."""
        device = self.root_device
        if device.type == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.num_processes
        free, _ = torch.get_device_module(device).mem_get_info(device)
        return int(_USABLE * free)

    @classmethod
    @override
    def registered(cls) -> dict[str, dict[str, Any]]:
        return {"auto": {}}


_PRECISIONS = {"fp8-mixed": "bf16-mixed"}
"""Names that plans do not know, and what rests and travels as it does under them."""


def _first_batch(trainer: pl.Trainer) -> Any:
    """A batch of the first samples of the training data."""
    return tree_map_only(DataLoader, _collated, trainer.fit_loop._data_source.dataloader())


def _collated(loader: DataLoader[Any]) -> Any:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ValueError(
            f"Expected training data that can be indexed and is batched by its DataLoader, got a"
            f" {type(loader.dataset).__name__}."
        )
    size: Any = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    samples = range(min(size, len(loader.dataset)))  # type: ignore[arg-type]
    return loader.collate_fn([loader.dataset[index] for index in samples])
