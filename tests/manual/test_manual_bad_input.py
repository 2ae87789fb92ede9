"""What an Accelerator refuses, and what it says then."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Net
from torch.optim.lr_scheduler import StepLR

from harness import Ranks
from lightning_accel import Accelerator
from lightning_accel.manual.choices import find_strategy, precision_arguments
from lightning_accel.strategies import AccelDDPStrategy
from lightning_accel.strategies import fabric as twins


def backward_before_prepare(accelerator: Accelerator) -> None:
    accelerator.backward(torch.ones((), requires_grad=True))


def model_twice(accelerator: Accelerator) -> None:
    net = Net()
    accelerator.prepare(net)
    accelerator.prepare(net)


def prepared_model_twice(accelerator: Accelerator) -> None:
    accelerator.prepare(accelerator.prepare(Net()))


def optimizer_twice(accelerator: Accelerator) -> None:
    net = Net()
    _, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    accelerator.prepare(optimizer)


def foreign_optimizer(accelerator: Accelerator) -> None:
    accelerator.prepare(Net(), torch.optim.SGD(Net().parameters(), lr=0.1))


def optimizer_of_two(accelerator: Accelerator) -> None:
    nets = [Net(), Net()]
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.1)
    accelerator.prepare(*nets, optimizer)


def scheduler_alone(accelerator: Accelerator) -> None:
    net = Net()
    accelerator.prepare(net, StepLR(torch.optim.SGD(net.parameters(), lr=0.1), 1))


def not_trained(accelerator: Accelerator) -> None:
    accelerator.prepare(Net(), [1, 2, 3])


def some_parameters(accelerator: Accelerator) -> None:
    net = Net()
    accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    accelerator.clip_grad_norm_(net.first.parameters(), 1.0)


def foreign_parameters(accelerator: Accelerator) -> None:
    net = Net()
    accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    accelerator.clip_grad_norm_(Net().parameters(), 1.0)


def accumulate_foreign(accelerator: Accelerator) -> None:
    with accelerator.accumulate(Net()):
        pass


def save_nowhere(accelerator: Accelerator) -> None:
    accelerator.save_state()


def stateless(accelerator: Accelerator) -> None:
    accelerator.register_for_checkpointing(object())


def log_too_early(accelerator: Accelerator) -> None:
    Accelerator(log_with="csv", project_dir="x", cpu=True).log({"loss": 1.0})


def steps_within_a_window(accelerator: Accelerator) -> None:
    accelerator.gradient_accumulation_steps = 3
    with accelerator.accumulate():
        accelerator.gradient_accumulation_steps = 2


def profile_twice(accelerator: Accelerator) -> None:
    with accelerator.profile(output_trace_dir="x", schedule=torch.profiler.schedule(wait=1, warmup=1, active=1)):
        pass


def no_such_process(accelerator: Accelerator) -> None:
    accelerator.on_process(print, process_index=1)


REFUSED: list[tuple[Callable[[Accelerator], None], str, str]] = [
    (backward_before_prepare, "RuntimeError", "Expected a model to be prepared before backward"),
    (model_twice, "ValueError", "Expected a model that was not prepared yet, got a Net"),
    (prepared_model_twice, "ValueError", "Expected a model that was not prepared yet, got a Net"),
    (optimizer_twice, "ValueError", "Expected an optimizer that was not prepared yet"),
    (foreign_optimizer, "ValueError", "Expected the parameters of SGD to belong to a prepared model"),
    (optimizer_of_two, "ValueError", "Expected the parameters of SGD to belong to one prepared model, got those of 2"),
    (scheduler_alone, "ValueError", "Expected the optimizer of StepLR to be prepared"),
    (not_trained, "TypeError", "got list. Use it as it is"),
    (some_parameters, "ValueError", "Expected all parameters of an optimizer to be clipped together, got 2 of 10"),
    (foreign_parameters, "ValueError", "got 10 that no prepared optimizer has"),
    (accumulate_foreign, "ValueError", "Expected a model that was prepared, got a Net"),
    (save_nowhere, "ValueError", "Expected output_dir for save_state() without a project_dir"),
    (stateless, "ValueError", "Expected objects with state_dict and load_state_dict to register"),
    (log_too_early, "RuntimeError", "Expected accelerator.init_trackers('name') before"),
    (steps_within_a_window, "RuntimeError", "to be changed between windows"),
    (profile_twice, "ValueError", "Expected output_trace_dir without schedule and on_trace_ready"),
    (no_such_process, "ValueError", "Expected a process from 0 to 0, got 1"),
]


def refusals() -> list[tuple[str, str]]:
    """The errors of all of the above, on one process."""
    found = []
    for refused, _, _ in REFUSED:
        accelerator = Accelerator(cpu=True)
        try:
            refused(accelerator)
            found.append(("nothing", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        accelerator.free_memory()
    return found


@pytest.mark.parametrize("world", [1], indirect=True)
def test_refused(world: Ranks) -> None:
    (found,) = world.run(refusals)
    for (refused, kind, said), (kind_found, message) in zip(REFUSED, found, strict=True):
        assert (refused.__name__, kind_found) == (refused.__name__, kind), message
        assert said in message


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"strategy": "zer2"}, ValueError, "Did you mean 'zero2'"),
        ({"strategy": "fsdp_partail"}, ValueError, "Did you mean 'fsdp_partial'"),
        ({"strategy": AccelDDPStrategy()}, TypeError, "a strategy of lightning_accel.strategies.fabric"),
        ({"strategy": twins.AccelDDPStrategy}, TypeError, "Make one of the class"),
        ({"strategy": twins.AccelDDPStrategy(start_method="spawn")}, ValueError, "starts no processes"),
        ({"mixed_precision": "bf61"}, ValueError, "Did you mean 'bf16'"),
        ({"mixed_precision": torch.bfloat16}, TypeError, "got torch.bfloat16"),
        ({"gradient_accumulation_steps": 0}, ValueError, "a whole number of 1 or more, got 0"),
        ({"gradient_acumulation_steps": 2}, TypeError, "Did you mean 'gradient_accumulation_steps'"),
        ({"fsdp_plugin": None}, TypeError, "'fsdp_plugin' is a strategy here"),
        ({"log_with": "tensorbord", "project_dir": "x"}, ValueError, "Did you mean 'tensorboard'"),
        ({"log_with": "csv"}, ValueError, "Expected project_dir or logging_dir with log_with='csv'"),
        ({"log_with": 3}, TypeError, "got int"),
        ({"patience_s": 0}, ValueError, "Expected patience_s to be positive"),
        ({"checkpoints_total_limit": 0}, ValueError, "Expected checkpoints_total_limit to be positive"),
    ],
)
def test_options(arguments: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as raised:
        Accelerator(**arguments)
    assert said in str(raised.value)


def test_variables_of_the_launcher_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_STRATEGY", "fsdp_hybird")
    with pytest.raises(ValueError, match="fsdp_hybrid"):
        Accelerator()


def test_names() -> None:
    assert [find_strategy(name).row.name for name in ("accel_fsdp", "zero3", "DDP")] == ["fsdp", "zero3", "ddp"]
    assert find_strategy("ddp")._checkpoints.are_sharded
    strategy = twins.AccelZeROStrategy(stage=1)
    assert find_strategy(strategy) is strategy
    assert precision_arguments("fp16") == {"precision": "16-mixed"}


def arguments_of_the_launcher() -> list[Any]:
    os.environ |= {"ACCEL_STRATEGY": "zero1", "ACCEL_MIXED_PRECISION": "bf16", "ACCEL_CPU": "true"}
    os.environ["ACCEL_GRADIENT_ACCUMULATION_STEPS"] = "3"
    told, asked = Accelerator(), Accelerator(strategy="fsdp", mixed_precision="no", gradient_accumulation_steps=2)
    return [
        (one.fabric.strategy.row.name, one.mixed_precision, one.gradient_accumulation_steps, one.device.type)
        for one in (told, asked)
    ]


@pytest.mark.parametrize("world", [1], indirect=True)
def test_arguments_take_precedence_over_the_launcher(world: Ranks) -> None:
    assert world.run(arguments_of_the_launcher)[0] == [("zero1", "bf16", 3, "cpu"), ("fsdp", "no", 2, "cpu")]
