"""Settings of DeepSpeed's schedules, and the learning rates and momenta that they have with DeepSpeed.

`deepspeed_values.json` was made by deepspeed 0.19.8 on the CPU, with `DS_ACCELERATOR=cpu`::

    PYTHONPATH=tests python -m schedules.settings tests/schedules/deepspeed_values.json

Entry k of a setting (k from 1) is what the k-th optimizer step has of each parameter group: the learning rate and the
betas, or null for an optimizer that has none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

STEPS = 200
# Each step at the ends and around the corners of the settings below, and some between.
CHOSEN = [*range(1, 16), *range(19, 24), *range(28, 33), 40, *range(49, 54), 60, 77, *range(79, 84), 90]
CHOSEN += [*range(98, 106), 113, *range(119, 124), 130, *range(149, 154), 170, 185, *range(196, 201)]

# name: class, parameters, learning rates of the optimizer's groups, optimizer
SETTINGS: dict[str, tuple[str, dict[str, Any], list[float], Callable[[Any], torch.optim.Optimizer]]] = {
    "range": ("LRRangeTest", {}, [0.1], torch.optim.SGD),
    "range quick": (
        "LRRangeTest",
        {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 30, "lr_range_test_step_rate": 5},
        [0.1],
        torch.optim.Adam,
    ),
    "range stairs": (
        "LRRangeTest",
        {"lr_range_test_min_lr": [1e-4, 1e-2], "lr_range_test_step_size": 7, "lr_range_test_staircase": True},
        [0.1, 0.2],
        torch.optim.Adam,
    ),
    "cycle": (
        "OneCycle",
        {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 50},
        [0.1],
        torch.optim.Adam,
    ),
    "cycle decay": (
        "OneCycle",
        {
            "cycle_min_lr": [1e-4, 2e-4],
            "cycle_max_lr": [1e-2, 3e-2],
            "cycle_first_step_size": 30,
            "cycle_second_step_size": 70,
            "decay_step_size": 10,
            "decay_lr_rate": 0.5,
            "cycle_min_mom": [0.7, 0.8],
            "cycle_max_mom": 0.95,
            "decay_mom_rate": -0.05,
        },
        [0.1, 0.2],
        torch.optim.AdamW,
    ),
    "cycle stairs": (
        "OneCycle",
        {
            "cycle_min_lr": 1e-3,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 80,
            "cycle_second_step_size": 41.5,
            "cycle_first_stair_count": 7,
            "cycle_second_stair_count": 3,
            "decay_step_size": 20,
            "decay_lr_rate": 0.1,
            "cycle_momentum": False,
        },
        [0.1],
        torch.optim.Adam,
    ),
    "cycle up": (
        "OneCycle",
        {"cycle_min_lr": 0.0, "cycle_max_lr": 1e-2, "cycle_first_step_size": 100, "cycle_second_step_size": 0},
        [0.1],
        torch.optim.SGD,
    ),
    "warm-up": ("WarmupLR", {"warmup_num_steps": 100}, [0.1, 0.02], torch.optim.Adam),
    "warm-up linear": (
        "WarmupLR",
        {"warmup_min_lr": [1e-5, 0], "warmup_max_lr": [1e-3, 0.1], "warmup_num_steps": 50, "warmup_type": "linear"},
        [0.1, 0.2],
        torch.optim.SGD,
    ),
    "warm-up of one": ("WarmupLR", {"warmup_max_lr": 1e-3, "warmup_num_steps": 1}, [0.1], torch.optim.Adam),
    "decay": (
        "WarmupDecayLR",
        {"total_num_steps": 150, "warmup_min_lr": 1e-4, "warmup_num_steps": 20},
        [0.1],
        torch.optim.Adam,
    ),
    "decay linear": (
        "WarmupDecayLR",
        {"total_num_steps": 120, "warmup_max_lr": [1e-2, 2e-2], "warmup_num_steps": 50, "warmup_type": "linear"},
        [0.1, 0.2],
        torch.optim.Adam,
    ),
    "decay late": ("WarmupDecayLR", {"total_num_steps": 10, "warmup_num_steps": 30}, [0.1], torch.optim.Adam),
    "cosine": ("WarmupCosineLR", {"total_num_steps": 200, "warmup_num_steps": 20}, [0.1, 0.2], torch.optim.Adam),
    "cosine linear": (
        "WarmupCosineLR",
        {
            "total_num_steps": 150,
            "warmup_min_ratio": 0.3,
            "warmup_num_steps": 50,
            "cos_min_ratio": 0.1,
            "warmup_type": "linear",
        },
        [0.1],
        torch.optim.SGD,
    ),
    "cosine late": ("WarmupCosineLR", {"total_num_steps": 10, "warmup_num_steps": 30}, [0.1], torch.optim.Adam),
}


def make_optimizer(name: str) -> torch.optim.Optimizer:
    """The optimizer of a setting: one scalar parameter for each group."""
    _, _, rates, kind = SETTINGS[name]
    groups = [{"params": [nn.Parameter(torch.ones(()))], "lr": rate} for rate in rates]
    return kind(groups)


def values(name: str, make: Callable[..., Any], steps: int = STEPS) -> list[list[list[Any]]]:
    """What each group has in each optimizer step: `make` is the schedule's class, of whichever library."""
    optimizer = make_optimizer(name)
    return run(optimizer, make(optimizer, **SETTINGS[name][1]), steps)


def run(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[list[list[Any]]]:
    found = []
    for _ in range(steps):
        found.append([[float(group["lr"]), list(group.get("betas", ())) or None] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def flat(entries: Any) -> list[float]:
    """All numbers in entries, one after the other."""
    if isinstance(entries, int | float):
        return [entries]
    return [] if entries is None else [number for entry in entries for number in flat(entry)]


def main(path: str) -> None:
    """Write the table."""
    import deepspeed
    from deepspeed.runtime import lr_schedules

    table: dict[str, Any] = {}
    for name, (kind, *_) in SETTINGS.items():
        found = values(name, getattr(lr_schedules, kind))
        table[name] = {str(k): found[k - 1] for k in CHOSEN}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(entries)}" for name, entries in table.items())
    about = f"made by deepspeed {deepspeed.__version__}, see settings.py"
    Path(path).write_text(f'{{"about": {json.dumps(about)}, "values": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main(sys.argv[1])
