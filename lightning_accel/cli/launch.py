"""``accel launch``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lightning_accel.cli.console import console, readable_errors

if TYPE_CHECKING:
    from lightning_accel.launching.settings import LaunchSettings
    from lightning_accel.launching.settings_file import Found

EITHER_SPELLING = {"token_normalize_func": lambda name: name.replace("-", "_")}
"""Options with dashes or underscores, as Accelerate's users write either."""


def launch(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python file, or with --module a module's name.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENTS", help="What follows is for the script.", show_default=False),
    ] = None,
    module: Annotated[
        bool, typer.Option("--module", "-m", help="SCRIPT is a module, as with python -m.", show_default=False)
    ] = False,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config_file",
            help="Settings for what no option says: a file of accel config, or one of Hugging Face Accelerate. By"
            " default the one that accel config writes, if it is there.",
            show_default=False,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num_processes",
            help="Ranks on all machines together. Default: one for each GPU, or one for each machine on the CPU.",
            show_default=False,
            rich_help_panel="Where",
        ),
    ] = None,
    num_machines: Annotated[
        int | None,
        typer.Option("--num_machines", help="How many. Default: 1.", show_default=False, rich_help_panel="Where"),
    ] = None,
    machine_rank: Annotated[
        int | None,
        typer.Option(
            "--machine_rank",
            help="Which of them this is; 0 is the one that the others meet at. Default: 0.",
            show_default=False,
            rich_help_panel="Where",
        ),
    ] = None,
    main_process_ip: Annotated[
        str | None,
        typer.Option(
            "--main_process_ip",
            help="Address of machine 0, as all machines reach it.",
            show_default=False,
            rich_help_panel="Where",
        ),
    ] = None,
    main_process_port: Annotated[
        int | None,
        typer.Option(
            "--main_process_port",
            help="Port there. Default: 29500; on one machine any that is free.",
            show_default=False,
            rich_help_panel="Where",
        ),
    ] = None,
    join_timeout: Annotated[
        float | None,
        typer.Option(
            "--join_timeout",
            help="Seconds to wait for the other machines. Default: 300.",
            show_default=False,
            rich_help_panel="Where",
        ),
    ] = None,
    gpu_ids: Annotated[
        str | None,
        typer.Option(
            "--gpu_ids",
            help="GPUs of this machine, such as 0,1; among those of CUDA_VISIBLE_DEVICES, if that is set. Default:"
            " all.",
            show_default=False,
            rich_help_panel="Where",
        ),
    ] = None,
    cpu: Annotated[
        bool | None,
        typer.Option(
            "--cpu/--no_cpu",
            help="Train on the CPU: the ranks see no GPU.",
            show_default=False,
            rich_help_panel="Where",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="accel_ddp, accel_zero1, accel_zero2, accel_zero3, accel_fsdp, accel_fsdp_partial, accel_fsdp_hybrid,"
            " or accel_auto (Trainer only); accel_ may be left out.",
            show_default=False,
            rich_help_panel="How",
        ),
    ] = None,
    deepspeed_config: Annotated[
        str | None,
        typer.Option(
            "--deepspeed_config",
            "--deepspeed_config_file",
            help="A DeepSpeed JSON file instead of --strategy (Accelerator, and Trainer and Fabric without a strategy"
            " of their own): strategy, precision, clipping, accumulation and more. It is checked before ranks start.",
            show_default=False,
            rich_help_panel="How",
        ),
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option("--mixed_precision", help="no, fp16, bf16 or fp8.", show_default=False, rich_help_panel="How"),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--gradient_accumulation_steps",
            help="Micro-batches in a step (Accelerator and Trainer).",
            show_default=False,
            rich_help_panel="How",
        ),
    ] = None,
    gradient_clipping: Annotated[
        float | None,
        typer.Option(
            "--gradient_clipping",
            help="The largest norm of gradients (Trainer).",
            show_default=False,
            rich_help_panel="How",
        ),
    ] = None,
    debug: Annotated[
        bool | None,
        typer.Option(
            "--debug/--no_debug",
            help="Check every collective of the Accelerator: slower, and errors instead of hanging.",
            show_default=False,
            rich_help_panel="How",
        ),
    ] = None,
    num_cpu_threads_per_process: Annotated[
        int | None,
        typer.Option(
            "--num_cpu_threads_per_process",
            help="Threads of a rank. Default: OMP_NUM_THREADS; on the CPU the cores, divided by the ranks here.",
            show_default=False,
            rich_help_panel="How",
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max_restarts",
            help="How often all ranks are started again after one has failed. Default: 0.",
            show_default=False,
            rich_help_panel="How",
        ),
    ] = None,
) -> None:
    """Run a script in several processes, on this machine or on several.

    Options go before SCRIPT, with dashes or underscores; what follows SCRIPT is the script's. All ranks end when one
    fails, and its traceback is the last thing on the screen; the exit status is that rank's.

    --strategy, --mixed_precision and the rest are for what the arguments of `lightning_accel.Accelerator`, Lightning's
    `Trainer` and its `Fabric` leave open: `Trainer()` trains on all ranks, with Lightning's own strategy unless there
    is one here. A script may also name a strategy of this package itself, without importing it.

    For example:

    - `accel launch --num_processes 2 --cpu train.py --lr 0.1`

    - `accel launch --strategy fsdp --mixed_precision bf16 train.py`

    - `accel launch --num_processes 2 train.py --strategy accel_fsdp`, where train.py hands it to a Trainer

    - `accel launch --num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 --num_processes 16 train.py`, and on
      the other machine the same with `--machine_rank 1`
    """
    given: dict[str, Any] = {
        "num_processes": num_processes,
        "num_machines": num_machines,
        "machine_rank": machine_rank,
        "main_process_ip": main_process_ip,
        "main_process_port": main_process_port,
        "join_timeout": join_timeout,
        "gpu_ids": gpu_ids,
        "cpu": cpu,
        "strategy": strategy,
        "deepspeed_config": deepspeed_config,
        "mixed_precision": mixed_precision,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": gradient_clipping,
        "debug": debug,
        "num_cpu_threads_per_process": num_cpu_threads_per_process,
        "max_restarts": max_restarts,
    }
    with readable_errors():
        from lightning_accel.launching.settings_file import read

        found = read(config_file)
        say_what_is_left_out(found)
        settings = replace(found.settings, **{name: value for name, value in given.items() if value is not None})
        run(settings, script, arguments or [], module=module)


def run(settings: LaunchSettings, script: str, arguments: list[str], *, module: bool = False) -> None:
    """Launch, and exit as the rank that failed.

    Args:
        settings: How.
        script: A Python file or a module.
        arguments: What it is given.
        module: Which of them.

    Raises:
        typer.Exit: If a rank fails, or this process is told to end.

    """
    from torch.distributed.elastic.multiprocessing import SignalException

    from lightning_accel.launching.agent import LaunchError
    from lightning_accel.launching.agent import launch as start

    try:
        start(settings, script, arguments, module=module)
    except LaunchError as error:
        console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(error.code) from error
    except SignalException as error:
        raise typer.Exit(128 + error.sigval) from error


def say_what_is_left_out(found: Found) -> None:
    """One message about what a file of Accelerate's says and cannot be taken over."""
    if found.left_out:
        text = "".join(f"\n- {sentence}" for sentence in found.left_out)
        console(stderr=True).print(
            Text.assemble(("Note: ", "bold yellow"), f"not all of {found.path} could be taken over:{text}"),
            soft_wrap=True,
        )
