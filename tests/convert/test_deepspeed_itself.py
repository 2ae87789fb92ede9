"""Checkpoints that DeepSpeed itself has made on two ranks: what comes out is what it holds in memory, bit by bit.

Needs the extra `deepspeed`; DS_ACCELERATOR=cpu is set here.
"""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import Net, assert_same, batch, step, tied
from torch import nn

from harness import Ranks
from lightning_accel.convert import convert, inspect
from lightning_accel.core.checkpoint import load

pytestmark = [
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed (extra `deepspeed`)"
    ),
    pytest.mark.timeout(900),  # to import it takes longer than anything else here
]

CASES = {
    "zero1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "zero1 bf16 optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "zero2 fp32": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "zero3 fp32": {"zero_optimization": {"stage": 3, "sub_group_size": 60}},
    "universal1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "universal3": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "no zero": {},
}


def train(name: str, folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, and one step more. Returns what DeepSpeed says that it had when it saved."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.manual_seed(0)
    net = Net()
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **CASES[name],
    }
    optimizer = torch.optim.AdamW(net.groups(), lr=1e-2)
    engine, optimizer, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)

    def one_step(number: int) -> None:
        tokens, targets = batch(2 * number + dist.get_rank())
        engine.backward(nn.functional.cross_entropy(engine(tokens).float(), targets))
        engine.step()

    for number in range(3):
        one_step(number)
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the state of the first group only: the others have none yet when it does so.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    engine.save_checkpoint(str(folder), tag="three", client_state={"epoch": 1, "note": [1, 2]})
    if name.startswith("universal"):
        to_universal(folder)
    trained = {key: parameter for key, parameter in net.named_parameters() if parameter.requires_grad}
    held: dict[str, Any] = {}
    for key, parameter in trained.items():
        if name == "no zero":
            held[key] = {"fp32": parameter.detach().clone(), **optimizer.state[parameter]}
        else:
            held[key] = {"fp32": safe_get_full_fp32_param(parameter).clone()}
            for entry in ("exp_avg", "exp_avg_sq"):
                held[key][entry] = safe_get_full_optimizer_state(parameter, entry).clone()
    if name == "round robin":  # where DeepSpeed looks in the wrong places, but the module has the right values
        held = {key: {"fp32": parameter.detach().clone()} for key, parameter in trained.items()}
    held = {key: {entry: value.detach().clone() for entry, value in state.items()} for key, state in held.items()}
    one_step(3)
    if CASES[name].get("zero_optimization", {}).get("stage") == 3:
        after = {key: safe_get_full_fp32_param(parameter).clone() for key, parameter in trained.items()}
    else:
        after = {key: parameter.detach().clone() for key, parameter in trained.items()}
    return {"held": held, "after": after}


def to_universal(folder: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    if dist.get_rank() == 0:
        arguments = types.SimpleNamespace(
            input_folder=str(folder / "three"),
            output_folder=str(folder / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        main(arguments)
        (folder / "latest").unlink()  # latest_universal counts
    dist.barrier()


def train_all(folder: Path) -> dict[str, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # A minute's compilation, for what gloo does as well.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    return {name: train(name, folder / name) for name in CASES}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Ranks of their own: DeepSpeed keeps process groups, and much else, for as long as the process lives."""
    folder = tmp_path_factory.mktemp("deepspeed")
    with Ranks(2, timeout=600) as ranks:
        yield folder, ranks.run(train_all, folder)[0]


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_that_deepspeed_holds(made: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    folder, results = made
    held = results[name]["held"]
    result = convert(folder / name, tmp_path / "sharded", to="sharded")
    assert result.left_out == []
    nest = load(tmp_path / "sharded")
    model, (optimizer,) = nest["state_dict"], nest["optimizer_states"]
    assert set(model) == set(Net().state_dict())
    assert tied(model, "embedding.weight", "head.weight") or name == "no zero"
    assert (nest["epoch"], nest["global_step"], nest["note"]) == (1, 3, [1, 2])
    names = [["first.bias", "norm.weight", "norm.bias"], ["embedding.weight", "first.weight", "second.weight"]]
    if name == "no zero":
        optimizer = named(optimizer, sum(names, []))
    assert [group["params"] for group in optimizer["param_groups"]] == names
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.0, 0.1]
    for key, state in held.items():
        assert_same(model[key], state["fp32"], key)
        for entry in set(state) - {"fp32"}:
            assert_same(optimizer["state"][key][entry], state[entry], f"{key} {entry}")
        assert_same(optimizer["state"][key]["step"], torch.tensor(3.0))

    torch.manual_seed(0)
    initial = Net().state_dict()
    still = [key for key in initial if key not in held and key != "head.weight"]
    for key in still:  # frozen, and buffers: floating-point parameters as the module has them
        kept = initial[key].bfloat16() if key.startswith("frozen") and "bf16" in CASES[name] else initial[key]
        assert_same(model[key], kept, key)
    assert inspect(folder / name).world_size == 2


def named(optimizer: dict[str, Any], names: list[str]) -> dict[str, Any]:
    groups = [{**group, "params": [names[at] for at in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {names[at]: state for at, state in optimizer["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("name", [name for name, settings in CASES.items() if "bf16" not in settings])
def test_training_goes_on_as_under_deepspeed(made: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    """On one device, with torch's own AdamW, from the file that stock Lightning loads."""
    folder, results = made
    convert(folder / name, tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    net = Net()
    optimizer = torch.optim.AdamW(net.groups())
    net.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    step(net, optimizer, 6, 7)
    parameters = dict(net.named_parameters())
    for key, expected in results[name]["after"].items():
        torch.testing.assert_close(
            parameters[key], expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
