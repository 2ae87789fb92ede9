"""What the ranks of ``accel launch`` are told, beside torchrun's own variables.

[Note: who reads what]
``ACCEL_*`` are the defaults of ``lightning_accel.Accelerator``, ``ACCELERATE_*`` those of Hugging Face's. A Lightning
Trainer takes each argument that the script does not give from ``PL_TRAINER_*``, and so does a Fabric here (see
lightning_defaults.py). The numbers of devices and machines are always told: in a rank of torchrun's, a Trainer that
finds no other number than one device on the CPU would train alone, and say nothing.
"""

from __future__ import annotations

import os

from lightning_accel import variables
from lightning_accel.launching.deepspeed import absolute
from lightning_accel.launching.settings import LaunchSettings


def environment(settings: LaunchSettings, local_processes: int) -> dict[str, str]:
    """The variables for the ranks of this machine.

    Args:
        settings: What is launched.
        local_processes: How many ranks this machine has.

    """
    found = {"PL_TRAINER_DEVICES": str(local_processes), "PL_TRAINER_NUM_NODES": str(settings.num_machines)}
    found |= _accel(settings)
    if settings.strategy is not None:
        found["PL_TRAINER_STRATEGY"] = settings.strategy
    if settings.precision is not None:
        found["PL_TRAINER_PRECISION"] = settings.precision
    if settings.gradient_accumulation_steps is not None:
        found["PL_TRAINER_ACCUMULATE_GRAD_BATCHES"] = str(settings.gradient_accumulation_steps)
    if settings.gradient_clipping is not None:
        found["PL_TRAINER_GRADIENT_CLIP_VAL"] = str(settings.gradient_clipping)
    if settings.cpu:
        found |= {"PL_TRAINER_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    elif settings.gpu_ids != "all":
        found["CUDA_VISIBLE_DEVICES"] = _visible(settings.gpu_ids)
    return found


def threads(settings: LaunchSettings, local_processes: int, *, on_cpu: bool) -> int | None:
    """What ``OMP_NUM_THREADS`` is to be; None if it stays what it is.

    Args:
        settings: What is launched.
        local_processes: How many ranks this machine has.
        on_cpu: Whether they train on the CPU.

    """
    if settings.num_cpu_threads_per_process is not None:
        return settings.num_cpu_threads_per_process
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(cores() // local_processes, 1) if on_cpu else None


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _visible(gpu_ids: str) -> str:
    """GPUs that are counted among those that this process sees, as CUDA is to be told."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not seen:
        return gpu_ids
    names = seen.split(",")
    return ",".join(names[int(number)].strip() for number in gpu_ids.split(","))


def _accel(settings: LaunchSettings) -> dict[str, str]:
    found = {
        variables.STRATEGY: settings.strategy,
        variables.DEEPSPEED_CONFIG: None if settings.deepspeed_config is None else absolute(settings.deepspeed_config),
        variables.MIXED_PRECISION: settings.mixed_precision,
        variables.CPU: "1" if settings.cpu else None,
        variables.ACCUMULATION: settings.gradient_accumulation_steps,
        variables.DEBUG: "1" if settings.debug else None,
        # Accelerate's own: told nothing, its ranks train alone on the CPU, and so does what stands on it.
        "ACCELERATE_USE_CPU": "true" if settings.cpu else None,
        "ACCELERATE_MIXED_PRECISION": settings.mixed_precision,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": settings.gradient_accumulation_steps,
    }
    return {name: str(value) for name, value in found.items() if value is not None}
