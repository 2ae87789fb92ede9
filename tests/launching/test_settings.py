"""What settings are accepted, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_accel.launching.settings import LaunchSettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 0}, "Expected num_processes to be a whole number of 1 or more, got 0"),
        ({"num_processes": True}, "Expected num_processes to be a whole number of 1 or more, got True"),
        ({"num_processes": "2"}, "Expected num_processes to be a whole number of 1 or more, got '2'"),
        ({"num_machines": None}, "Expected num_machines to be a whole number of 1 or more, got None"),
        ({"machine_rank": 1}, "Expected machine_rank to be one of 0 to 0, got 1 of num_machines=1"),
        ({"num_machines": 2, "main_process_ip": "a", "num_processes": 3}, "to be a multiple of num_machines=2, got 3"),
        ({"num_machines": 2}, "Expected main_process_ip, the address of machine 0, with num_machines=2, got none"),
        ({"main_process_ip": ""}, "Expected main_process_ip to be text, got ''"),
        ({"main_process_port": 65_536}, "Expected main_process_port to be a whole number from 1 to 65535, got 65536"),
        ({"gpu_ids": "0,0"}, "Expected gpu_ids to be 'all' or different numbers with commas, such as '0,1', got '0,0'"),
        ({"gpu_ids": "first"}, "got 'first'"),
        ({"gpu_ids": "0", "cpu": True}, "Expected gpu_ids or cpu, got both"),
        ({"cpu": "yes"}, "Expected cpu to be true or false, got 'yes'"),
        ({"mixed_precision": "bf-16"}, "to be one of no, fp16, bf16, fp8, got 'bf-16'. Did you mean bf16?"),
        ({"strategy": "accel_fdsp"}, "got 'accel_fdsp'. Did you mean accel_fsdp?"),
        ({"strategy": "zero_2"}, "got 'zero_2'. Did you mean zero2?"),
        ({"strategy": "megatron"}, "accel_auto, got 'megatron'."),
        ({"gradient_accumulation_steps": 1.5}, "to be a whole number of 1 or more, got 1.5"),
        ({"gradient_clipping": -1.0}, "Expected gradient_clipping to be a positive number, got -1.0"),
        ({"gradient_clipping": float("nan")}, "Expected gradient_clipping to be a positive number, got nan"),
        ({"max_restarts": -1}, "Expected max_restarts to be a whole number of 0 or more, got -1"),
        ({"join_timeout": 0}, "Expected join_timeout to be a positive number, got 0"),
    ],
)
def test_bad_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        LaunchSettings(**given)
    assert message in str(caught.value)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"in a.yaml, got 'num_procs' \(did you mean 'num_processes'\?\), 'colour'\."):
        LaunchSettings.from_mapping({"num_procs": 2, "colour": "red", "cpu": True}, "a.yaml")
    with pytest.raises(ValueError, match="^a.yaml: Expected cpu to be true or false"):
        LaunchSettings.from_mapping({"cpu": 1}, "a.yaml")


@pytest.mark.parametrize("name", ["accel_fsdp", "fsdp"])
def test_the_prefix_of_a_strategy_may_be_left_out(name: str) -> None:
    assert LaunchSettings(strategy=name).strategy == "accel_fsdp"


def test_only_what_was_given_has_changed() -> None:
    assert LaunchSettings().changed() == {}
    assert LaunchSettings(strategy="ddp", max_restarts=2).changed() == {"strategy": "accel_ddp", "max_restarts": 2}


@pytest.mark.parametrize(
    ("given", "gpus", "ranks"),
    [
        ({}, 0, 1),
        ({}, 4, 4),
        ({"cpu": True}, 4, 1),
        ({"gpu_ids": "1,3"}, 4, 2),
        ({"num_processes": 3}, 0, 3),
        ({"num_processes": 2}, 4, 2),
        ({"num_processes": 6, "num_machines": 2, "main_process_ip": "a"}, 3, 3),
        ({"num_processes": 6, "cpu": True}, 1, 6),
    ],
)
def test_ranks_of_a_machine(given: dict[str, Any], gpus: int, ranks: int) -> None:
    assert LaunchSettings(**given).local_processes(gpus) == ranks


@pytest.mark.parametrize(
    ("given", "gpus", "message"),
    [
        ({"num_processes": 3}, 2, "Expected a GPU for each rank, got 3 ranks on this machine and 2 GPUs"),
        ({"num_processes": 2, "gpu_ids": "1"}, 2, "got 2 ranks on this machine and 1 GPUs"),
        ({"gpu_ids": "0,5,7"}, 2, "name GPUs of this machine, 2 of which can be seen here, got 5, 7 in 0,5,7"),
    ],
)
def test_too_few_gpus(given: dict[str, Any], gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaunchSettings(**given).local_processes(gpus)
