"""``accel config``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lightning_accel.cli.console import console, readable_errors
from lightning_accel.cli.launch import say_what_is_left_out

if TYPE_CHECKING:
    from lightning_accel.launching.settings import LaunchSettings


def config(
    default: Annotated[
        bool, typer.Option("--default", help="Ask nothing: write the settings for this machine.", show_default=False)
    ] = False,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config_file",
            help="Where to write. Default: lightning_accel/default.yaml in $XDG_CONFIG_HOME or ~/.config, which accel"
            " launch reads.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --default: replace what is there.", show_default=False)
    ] = False,
) -> None:
    """Ask how scripts are to be launched here, and write it to a file for `accel launch`.

    Every answer is checked at once. What the file says already is offered as the answer; a file of Hugging Face
    Accelerate at that place becomes one of ours, and one that cannot be read is replaced. On several machines write one
    file on each.

    For example:

    - `accel config`

    - `accel config --default --config_file cluster.yaml`, and then `accel launch --config_file cluster.yaml train.py`
    """
    with readable_errors():
        import torch

        from lightning_accel.launching.settings import LaunchSettings
        from lightning_accel.launching.settings_file import default_path, read, write

        path = config_file or default_path()
        gpus = torch.cuda.device_count()
        if default:
            if path.exists() and not overwrite:
                raise ValueError(f"Expected nothing at {path}, found a file. Use --overwrite to replace it.")
            settings = LaunchSettings(cpu=not gpus)  # how many ranks is found when they start
        else:
            settings = LaunchSettings()
            if path.exists():
                try:
                    found = read(path)
                except ValueError as error:
                    note = Text.assemble(("Note: ", "bold yellow"), f"{error} What you answer replaces the file.")
                    console(stderr=True).print(note, soft_wrap=True)
                else:
                    say_what_is_left_out(found)
                    settings = found.settings
            settings = _asked(settings, gpus)
        write(settings, path)
    console().print(Text(f"Written: {path}"))


def _asked(settings: LaunchSettings, gpus: int) -> LaunchSettings:
    """Settings with what the user answers."""
    machines = _ask(settings, "num_machines", "How many machines", int)
    if machines > 1:
        address = "none"
        while address == "none":
            address = _prompt("Address of machine 0, as all machines reach it", settings.main_process_ip)
        settings = replace(settings, num_machines=machines, main_process_ip=address, machine_rank=0, num_processes=None)
        rank = _ask(settings, "machine_rank", f"Which of them is this, 0 to {machines - 1}", int)
        settings = replace(settings, machine_rank=rank)
        port = _ask(settings, "main_process_port", "Port on machine 0 to meet at", int, 29_500)
        settings = replace(settings, main_process_port=port)
    else:
        settings = replace(settings, num_machines=1, machine_rank=0, main_process_ip=None)
    cpu = typer.confirm("Train on the CPU", default=settings.cpu or not gpus)
    settings = replace(settings, cpu=cpu, gpu_ids="all" if cpu else settings.gpu_ids)
    if not cpu:
        gpu_ids = _ask(settings, "gpu_ids", "Which GPUs of this machine: all, or numbers such as 0,1", str)
        settings = replace(settings, gpu_ids=gpu_ids)
    suggested = machines * (gpus if not cpu and gpus else 1)
    # Without a strategy, which would contradict a file before its question is answered.
    path = _ask(replace(settings, strategy=None), "deepspeed_config", "DeepSpeed's JSON file, if there is one", _file)
    settings = replace(settings, strategy=settings.strategy if path is None else None, deepspeed_config=path)
    questions: list[tuple[str, str, Callable[[str], Any], Any]] = [
        ("num_processes", "Ranks on all machines together", int, suggested),
        ("strategy", "Strategy, such as accel_ddp, accel_zero2 or accel_fsdp; none leaves it to the script", str, None),
        ("mixed_precision", "Mixed precision: no, fp16, bf16 or fp8; none leaves it to the script", str, None),
        ("gradient_accumulation_steps", "Micro-batches in a step; none leaves it to the script", int, None),
        ("max_restarts", "How often to start the ranks again after one has failed", int, None),
    ]
    for name, question, kind, shown in questions:
        if name == "strategy" and path is not None:
            continue  # the file says it
        settings = replace(settings, **{name: _ask(settings, name, question, kind, shown)})
    return settings


def _file(answer: str) -> str:
    from lightning_accel.launching.deepspeed import absolute, require_sound

    try:
        require_sound(answer)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    return absolute(answer)


def _ask(settings: LaunchSettings, name: str, question: str, kind: Callable[[str], Any], shown: Any = None) -> Any:
    """The answer for one setting; asked again until it is accepted."""
    now = getattr(settings, name)
    while True:
        answer = _prompt(question, shown if now is None else now)
        try:
            value = None if answer == "none" else kind(answer)
            later: dict[str, Any] = {"machine_rank": 0, "main_process_ip": "asked for next", "num_processes": None}
            replace(settings, **{name: value, **(later if name == "num_machines" else {})})
        except ValueError as error:
            text = str(error) if str(error).startswith("Expected") else f"Expected a whole number, got {answer!r}."
            console(stderr=True).print(Text(text, style="red"), soft_wrap=True)
            continue
        return value


def _prompt(question: str, shown: Any) -> str:
    return str(typer.prompt(question, default="none" if shown is None else str(shown))).strip()
