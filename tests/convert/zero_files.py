"""Writes the files of DeepSpeed's ZeRO, as DeepSpeed 0.19 does, where DeepSpeed is not installed."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Group = dict[str, Tensor]


@pytest.fixture
def deepspeed_classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Classes that pickle as DeepSpeed's records do."""
    found = {}
    for module, name in (
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        found[name] = type(name, (), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], name, found[name], raising=False)
    return found


@dataclass
class Zero:
    """A model and its Adam, as they are before they are divided."""

    groups: list[Group]
    """The fp32 values of each parameter group, in the optimizer's order."""
    frozen: Group = field(default_factory=dict)
    buffers: Group = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)
    alignment: int = 1
    """Of parameters in the flat tensors of stages 1 and 2."""

    def moment(self, key: str, name: str) -> Tensor:
        """What Adam has of a parameter: numbers that are nobody else's."""
        values = next(group[name] for group in self.groups if name in group)
        return values * {"exp_avg": 3, "exp_avg_sq": 5}[key]

    def write(self, folder: Path, stage: int, ranks: int, classes: Mapping[str, type]) -> None:
        """Write what each rank writes, and what says which is the latest."""
        inner = folder / "global_step7"
        inner.mkdir(parents=True)
        (folder / "latest").write_text("global_step7")
        groups = [self._dealt(group, ranks) for group in self.groups]
        flat = [self._flat(group, stage, ranks, group.__getitem__) for group in groups]
        moments = [
            {
                key: self._flat(group, stage, ranks, lambda name, key=key: self.moment(key, name))
                for key in ("exp_avg", "exp_avg_sq")
            }
            for group in groups
        ]
        for rank in range(ranks):
            self._write_model(inner, groups, stage, rank, ranks)
            self._write_optimizer(inner, flat, moments, stage, rank, ranks, classes)

    def _dealt(self, group: Group, ranks: int) -> Group:
        if not self.config.get("round_robin_gradients"):
            return group
        names = list(group)
        return {name: group[name] for rank in range(ranks) for name in names[rank::ranks]}

    def _flat(self, group: Group, stage: int, ranks: int, values: Any) -> list[Tensor]:
        """A part of each rank."""
        if stage == 3:
            parts = [cut(values(name).reshape(-1), ranks) for name in group]
            return [torch.cat([part[rank] for part in parts]) for rank in range(ranks)]
        pieces = [torch.cat([values(name).reshape(-1), torch.zeros(pad)]) for name, pad in self._padded(group)]
        whole = torch.cat(pieces)
        return cut(torch.cat([whole, torch.full((-whole.numel() % (2 * ranks),), torch.nan)]), ranks)

    def _padded(self, group: Group) -> list[tuple[str, int]]:
        names = list(group)
        return [(name, 0 if name == names[-1] else -group[name].numel() % self.alignment) for name in names]

    def _write_model(self, folder: Path, groups: list[Group], stage: int, rank: int, ranks: int) -> None:
        if stage < 3 and rank:
            return
        everything = {**self.buffers, **{name: value for group in self.groups for name, value in group.items()}}
        everything |= self.frozen
        everything |= {alias: everything[name] for alias, name in self.tied.items()}
        away = torch.empty(0, dtype=torch.bfloat16)
        state = {
            "module": {
                name: value if name in self.buffers else value.bfloat16() if stage < 3 else away
                for name, value in everything.items()
            },
            "buffer_names": list(self.buffers),
            "optimizer": None,
            "param_shapes": [{name: value.shape for name, value in group.items()} for group in groups],
            "frozen_param_shapes": {name: value.shape for name, value in self.frozen.items()},
            "frozen_param_fragments": {
                name: cut(value.bfloat16().reshape(-1), ranks)[rank] if stage == 3 else value.bfloat16()
                for name, value in self.frozen.items()
            },
            "shared_params": self.tied if rank == 0 else {},
            "lr_scheduler": None,
            "global_steps": 7,
            "dp_world_size": ranks,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": stage, **self.config}},
            "ds_version": "0.19.8",
            **self.client,
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save(state, folder / f"{name}_model_states.pt")

    def _write_optimizer(
        self,
        folder: Path,
        flat: Sequence[Sequence[Tensor]],
        moments: Sequence[Mapping[str, Sequence[Tensor]]],
        stage: int,
        rank: int,
        ranks: int,
        classes: Mapping[str, type],
    ) -> None:
        scaler = classes["LossScaler"]()
        scaler.cur_scale = 1.0
        inner = {
            "state": {
                index: {"step": torch.tensor(7.0), **{key: parts[rank] for key, parts in state.items()}}
                for index, state in enumerate(moments)
            },
            "param_groups": [{"lr": 0.1 * (index + 1), "params": [index]} for index in range(len(flat))],
        }
        parts = [group[rank] for group in flat]
        state: dict[str, Any] = {
            "loss_scaler": scaler,
            "dynamic_loss_scale": False,
            "partition_count": [ranks] * len(flat),
        }
        if stage == 3:
            parts = [torch.nn.Parameter(part) for part in parts]
            state |= {"partition_count": ranks, "optimizer_state_dict": inner, "fp32_flat_groups": parts}
        else:
            state |= {"base_optimizer_state": inner, "single_partition_of_fp32_groups": [lean(part) for part in parts]}
            state["param_slice_mappings"] = [{"wrong": classes["fragment_address"]()}]
            state["param_alignment_paddings"] = [
                [pad for _, pad in self._padded(self._dealt(group, ranks))] for group in self.groups
            ]
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def cut(flat: Tensor, ranks: int) -> list[Tensor]:
    """In equal parts, the last one padded."""
    part = math.ceil(flat.numel() / ranks)
    if not part:
        return [flat] * ranks
    padded = torch.cat([flat, torch.zeros(part * ranks - flat.numel(), dtype=flat.dtype)])
    return [piece.clone() for piece in padded.split(part)]


def lean(part: Tensor) -> Tensor:
    """Without what pads the group at its end (NaN here)."""
    return part[: int((~part.isnan()).sum())].clone()
