"""What ``accel launch`` is told, wherever it comes from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_accel.core.placement import ROWS

STRATEGIES = tuple(f"accel_{name}" for name in (*ROWS, "auto"))
"""What ``strategy`` may be; the prefix may be left out."""

MIXED_PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed", "fp8": "fp8-mixed"}
"""What ``mixed_precision`` may be, in Accelerate's words, and what Lightning calls it."""

_HIGHEST_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """How the ranks of a script are started, and what they are told.

    What is None is left to the script, or to what is found on the machine.

    Raises:
        ValueError: If a value is not of its kind, out of range, or contradicts another.

    """

    num_processes: int | None = None
    """Ranks on all machines together. Default: one for each GPU that is used, or one for each machine on the CPU."""
    num_machines: int = 1
    """How many machines take part. ``accel launch`` is run on each."""
    machine_rank: int = 0
    """Which of them this is: 0 for the one that the others meet at."""
    main_process_ip: str | None = None
    """Address or name of machine 0 that all machines reach. Needed for several machines."""
    main_process_port: int | None = None
    """Port on machine 0 that the machines meet at. Default: 29500; on one machine any that is free."""
    gpu_ids: str = "all"
    """The GPUs to use on this machine, such as 0,1; or all. Where CUDA_VISIBLE_DEVICES is set, they are counted among
    those that it names."""
    cpu: bool = False
    """Whether to train on the CPU although there are GPUs. The ranks do not see any then."""
    mixed_precision: str | None = None
    """What to compute with: no, fp16, bf16 or fp8."""
    strategy: str | None = None
    """A strategy of this package, such as accel_fsdp."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON file, which says the strategy and more; read by ``lightning_accel.Accelerator``, and by Trainers
    and Fabrics that name no strategy."""
    gradient_accumulation_steps: int | None = None
    """How many micro-batches make a step."""
    gradient_clipping: float | None = None
    """The largest norm of gradients, for scripts with Lightning's Trainer."""
    debug: bool = False
    """Whether the collectives of ``lightning_accel.Accelerator`` are checked: a shape that differs is an error then."""
    num_cpu_threads_per_process: int | None = None
    """Threads for the operations of a rank. Default: the machine's cores, divided by its ranks, if these train on the
    CPU; or what OMP_NUM_THREADS says."""
    max_restarts: int = 0
    """How often the ranks are started again after one has failed."""
    join_timeout: float = 300.0
    """Seconds to wait for the other machines."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value is None and field.default is None):
                _CHECKS[field.name](field.name, value)
        object.__setattr__(self, "strategy", _find_strategy(self.strategy))
        self._check_machines()
        if self.strategy is not None and self.deepspeed_config is not None:
            raise ValueError(
                f"Expected strategy or deepspeed_config, which says it, got both: strategy={self.strategy} and"
                f" deepspeed_config={self.deepspeed_config}. Leave one of them out."
            )
        if self.cpu and self.gpu_ids != "all":
            raise ValueError(
                f"Expected gpu_ids or cpu, got both: gpu_ids={self.gpu_ids} and cpu=True. Leave one out (gpu_ids=all)."
            )

    def _check_machines(self) -> None:
        if not self.machine_rank < self.num_machines:
            raise ValueError(
                f"Expected machine_rank to be one of 0 to {self.num_machines - 1}, got {self.machine_rank} of"
                f" num_machines={self.num_machines}."
            )
        if self.num_processes is not None and self.num_processes % self.num_machines:
            raise ValueError(
                f"Expected num_processes, which counts the ranks of all machines, to be a multiple of"
                f" num_machines={self.num_machines}, got {self.num_processes}."
            )
        if self.num_machines > 1 and self.main_process_ip is None:
            raise ValueError(
                f"Expected main_process_ip, the address of machine 0, with num_machines={self.num_machines}, got none."
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str) -> LaunchSettings:
        """Settings by their names.

        Args:
            mapping: Names and values.
            where: Where they come from, for messages.

        Raises:
            ValueError: If there is a name that is none of ours, or a value that is not accepted.

        """
        known = [field.name for field in fields(cls)]
        unknown = [str(name) for name in mapping if name not in known]
        if unknown:
            raise ValueError(
                f"Expected settings of accel launch in {where}, got {describe_unknown(unknown, known)}."
                f" Settings are {', '.join(known)}."
            )
        try:
            return cls(**mapping)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by name."""
        return {field.name: v for field in fields(self) if (v := getattr(self, field.name)) != field.default}

    @property
    def precision(self) -> str | None:
        """``mixed_precision``, as Lightning calls it."""
        return None if self.mixed_precision is None else MIXED_PRECISIONS[self.mixed_precision]

    def local_processes(self, gpus: int) -> int:
        """How many ranks this machine has.

        Args:
            gpus: How many GPUs there are.

        Raises:
            ValueError: If these are fewer than the ranks, or than ``gpu_ids`` names.

        """
        usable = 0 if self.cpu else gpus
        if self.gpu_ids != "all":
            named = [int(number) for number in self.gpu_ids.split(",")]
            missing = sorted(number for number in named if number >= gpus)
            if missing:
                raise ValueError(
                    f"Expected gpu_ids to name GPUs of this machine, {gpus} of which can be seen here, got"
                    f" {', '.join(map(str, missing))} in {self.gpu_ids}. Where CUDA_VISIBLE_DEVICES is set, they are"
                    " counted from 0 among those that it names."
                )
            usable = len(named)
        ranks = max(usable, 1) if self.num_processes is None else self.num_processes // self.num_machines
        if usable and ranks > usable:
            raise ValueError(
                f"Expected a GPU for each rank, got {ranks} ranks on this machine and {usable} GPUs. Lower"
                f" num_processes, or train on the CPU (--cpu)."
            )
        return ranks


def describe_unknown(unknown: Collection[str], known: Collection[str]) -> str:
    """Unknown names, each with the nearest of those that are known."""
    parts = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        parts.append(f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name))
    return ", ".join(parts)


def _find_strategy(name: str | None) -> str | None:
    if name is None or name in STRATEGIES:
        return name
    if f"accel_{name}" in STRATEGIES:
        return f"accel_{name}"
    near = difflib.get_close_matches(name.lower(), [*STRATEGIES, *(known[6:] for known in STRATEGIES)], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"Expected strategy to be one of {', '.join(STRATEGIES)}, got {name!r}.{hint}")


class _Number:
    """A number within bounds."""

    def __init__(self, least: float, most: float | None = None, *, whole: bool = True) -> None:
        self.least = least
        self.most = most
        self.whole = whole

    def __call__(self, name: str, value: object) -> None:
        fits = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if not fits or not self.least <= value <= (value if self.most is None else self.most):  # type: ignore[operator]
            limit = f"of {self.least} or more" if self.most is None else f"from {self.least} to {self.most}"
            raise ValueError(f"Expected {name} to be a {'whole ' if self.whole else ''}number {limit}, got {value!r}.")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"Expected {name} to be true or false, got {value!r}.")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"Expected {name} to be text, got {value!r}.")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"Expected {name} to be a positive number, got {value!r}.")


def _gpus(name: str, value: object) -> None:
    numbers = value.split(",") if isinstance(value, str) else []
    if value == "all":
        return
    if not numbers or not all(re.fullmatch(r"\d+", number) for number in numbers) or len({*numbers}) < len(numbers):
        raise ValueError(f"Expected {name} to be 'all' or different numbers with commas, such as '0,1', got {value!r}.")


def _precision(name: str, value: object) -> None:
    if not isinstance(value, str) or value not in MIXED_PRECISIONS:
        near = difflib.get_close_matches(str(value).lower(), MIXED_PRECISIONS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"Expected {name} to be one of {', '.join(MIXED_PRECISIONS)}, got {value!r}.{hint}")


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "num_processes": _Number(1),
    "num_machines": _Number(1),
    "machine_rank": _Number(0),
    "main_process_ip": _text,
    "main_process_port": _Number(1, _HIGHEST_PORT),
    "gpu_ids": _gpus,
    "cpu": _flag,
    "mixed_precision": _precision,
    "strategy": _text,
    "deepspeed_config": _text,
    "gradient_accumulation_steps": _Number(1),
    "gradient_clipping": _positive,
    "debug": _flag,
    "num_cpu_threads_per_process": _Number(1),
    "max_restarts": _Number(0),
    "join_timeout": _positive,
}
