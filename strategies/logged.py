"""What is logged of whole epochs, out of a fit and into another: sums over batches, and the states of torchmetrics.

Lightning saves none of it. A run that goes on within an epoch would have the mean over the batches that are left for
that of the epoch, and callbacks and schedulers that follow it would decide otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric, MetricCollection

# What is said to ``self.log``, by the names of Lightning's record of it.
_SAID = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)
_VALUES = ("value", "cumulated_batch_size", "_forward_cache")
# By which function a value was said to be reduced: a later ``self.log`` has to say the same.
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
    "builtins.sum": sum,
    "builtins.min": min,
    "builtins.max": max,
}


@dataclass(frozen=True)
class Snapshot:
    """What had been logged at some moment. Nothing of it is changed in place later."""

    results: list[tuple[str, _Metadata, bool, int, dict[str, Tensor]]]
    """Lightning's entries: key, what was said to ``self.log``, whether it is no metric, updates, and values by name."""
    metrics: dict[str, dict[str, Any]]
    """The states of the module's metrics, by name."""


class EpochLog:
    """What one rank logs in the epoch of training that is under way.

    Args:
        trainer: In a fit.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    @functools.cached_property
    def _metrics(self) -> dict[str, Metric]:
        modules = self._trainer.lightning_module.named_modules()
        return {name: module for name, module in modules if isinstance(module, Metric)}

    @functools.cached_property
    def _collections(self) -> list[MetricCollection]:
        return [module for module in self._trainer.lightning_module.modules() if isinstance(module, MetricCollection)]

    def now(self) -> Snapshot:
        """What was logged so far. Nothing is computed, sent or waited for: it is asked for with every batch."""
        results = []
        for key, result in self._trainer.fit_loop.epoch_loop._results.items():
            meta = result.meta
            if result.has_reset or meta.enable_graph or meta.sync.group is not None:
                continue  # it begins anew with the next value, or cannot be saved
            names = _VALUES if result.is_tensor else _VALUES[-1:]
            found = {name: value for name in names if isinstance(value := getattr(result, name, None), Tensor)}
            results.append((key, meta, result.is_tensor, result._update_count, found))
        for collection in self._collections:
            list(collection.items(copy_state=False))  # metrics that share a state with another one get it now
        metrics = {}
        for name, metric in self._metrics.items():
            if metric._update_count:
                values = {key: getattr(metric, key) for key in metric._defaults}
                state = {key: [*value] if isinstance(value, list) else value.clone() for key, value in values.items()}
                metrics[name] = {"count": metric._update_count, "state": state}
        return Snapshot(results, metrics)

    def saved(self, snapshot: Snapshot | None) -> dict[str, Any]:
        """What a checkpoint has of a snapshot, or of this moment: plain values, and copies of tensors on the CPU."""
        snapshot = snapshot or self.now()
        results = []
        for key, meta, is_tensor, count, values in snapshot.results:
            entry = {name: getattr(meta, name) for name in _SAID}
            entry |= {"key": key, "is_tensor": is_tensor, "count": count, "values": values}
            entry["reduction"] = next(name for name, function in _REDUCTIONS.items() if function is meta.reduce_fx)
            entry["sync"] = {"_should": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}
            results.append(entry)
        nest = {"results": results, "metrics": snapshot.metrics}
        copies: dict[str, Any] = apply_to_collection(nest, Tensor, lambda value: value.detach().to("cpu", copy=True))
        return copies

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Have a fit that goes on after a batch log as if it had not been interrupted. Call it before the next one."""
        for name, own in saved["metrics"].items():
            if (metric := self._metrics.get(name)) is not None and own["state"].keys() == metric._defaults.keys():
                for key, value in own["state"].items():
                    setattr(metric, key, move_data_to_device(value, metric.device))
                metric._update_count, metric._computed = own["count"], None
        strategy = self._trainer.strategy
        results = self._trainer.fit_loop.epoch_loop._results
        for entry in saved["results"]:
            meta = _Metadata(**{name: entry[name] for name in _SAID}, reduce_fx=_REDUCTIONS[entry["reduction"]])
            meta.sync = _Sync(fn=strategy.reduce, **entry["sync"])
            result = _ResultMetric(meta, entry["is_tensor"]).to(strategy.root_device)
            for name, value in entry["values"].items():
                setattr(result, name, value.to(strategy.root_device))
            if not result.is_tensor:
                if entry["metric_attribute"] not in self._metrics:
                    continue  # the module is another one
                result.value = self._metrics[entry["metric_attribute"]]
            result._update_count = entry["count"]
            results[entry["key"]] = result
        connector = self._trainer._logger_connector
        connector._first_loop_iter = False  # or the first batch would begin all of them anew
        if results:
            connector.on_batch_end()  # shows the values of the last batch
