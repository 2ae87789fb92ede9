"""torch's profiler around a part of a manual loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(device: torch.device, rank: int, folder: Path | None, arguments: dict[str, Any]) -> Iterator[profile]:
    """Profile what happens within it.

    Args:
        device: Activities of it are recorded besides the CPU's, unless ``arguments`` say which.
        rank: Part of the trace's name.
        folder: Where a trace for Chrome or Perfetto goes, ``profile_rank<rank>.json``, when it is over; none if None.
        arguments: For ``torch.profiler.profile``.

    Raises:
        ValueError: If there is an ``on_trace_ready`` and a folder: a schedule writes its own traces.

    """
    if folder is not None and (arguments.get("on_trace_ready") or arguments.get("schedule")):
        raise ValueError(
            "Expected output_trace_dir without schedule and on_trace_ready, which say when and where traces are"
            " written. Use on_trace_ready=torch.profiler.tensorboard_trace_handler(folder) instead."
        )
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(**{"activities": activities, **arguments}) as profiler:
        yield profiler
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"profile_rank{rank}.json"))
