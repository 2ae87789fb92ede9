"""What a DeepSpeed file asks to be shown of training, while an engine trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightning_accel.core import Engine
from lightning_accel.deepspeed_config import DeepSpeedConfig

if TYPE_CHECKING:
    from lightning_accel.core.flops_table import Flops

WHAT = "bytes at rest and the last step's messages"
WITH_TIMES = f"{WHAT}, and where the time of steps goes"


def shows_report(config: DeepSpeedConfig) -> bool:
    """Whether the engine's report is to be shown: at the end of a fit, and every ``steps_per_print`` steps."""
    return any(config[name] is True for name in ("comms_logger.enabled", "memory_breakdown", "wall_clock_breakdown"))


def describe(config: DeepSpeedConfig) -> str:
    """What is in the report."""
    return WITH_TIMES if config["wall_clock_breakdown"] is True else WHAT


def show(engine: Engine) -> None:
    """Show an engine's report. All ranks call it together."""
    rank_zero_info(str(engine.report(all_ranks=True)))


def watch(engine: Engine, config: DeepSpeedConfig) -> None:
    """Have an engine's steps timed and counted as a file says; the same on all ranks."""
    if config["wall_clock_breakdown"] is True:
        engine.phases.time_steps()
    if config["flops_profiler.enabled"] is True:
        from lightning_accel.core.flops import FlopCount

        def shown(flops: Flops) -> None:
            _show_flops(flops, config)

        engine.phases.add(FlopCount(engine, shown, after=config["flops_profiler.profile_step"]))


def _show_flops(flops: Flops, config: DeepSpeedConfig) -> None:
    if flops.rank != 0:
        return
    text = flops.table(
        depth=config["flops_profiler.module_depth"],
        top=config["flops_profiler.top_modules"],
        detailed=config["flops_profiler.detailed"],
    )
    file = config["flops_profiler.output_file"]
    if file is None:
        rank_zero_info(text)
        return
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    rank_zero_info(f"{config.where}: wrote the floating-point operations of step {flops.step} to {path}.")
