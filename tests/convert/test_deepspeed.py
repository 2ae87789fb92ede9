"""DeepSpeed's checkpoints: everything comes out as it was before it was divided."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same, tied
from zero_files import Zero, deepspeed_classes  # noqa: F401 a fixture

from lightning_accel.convert import convert, inspect
from lightning_accel.core.checkpoint import load

pytestmark = pytest.mark.usefixtures("deepspeed_classes")
Classes = Mapping[str, type]


def make(**settings: Any) -> Zero:
    torch.manual_seed(0)
    first = {
        "embedding": torch.randn(7, 5),
        "weight": torch.randn(9, 5),
        "scale": torch.randn(()),
        "none": torch.randn(0, 3),
    }
    second = {"bias": torch.randn(9), "one": torch.randn(1), "other": torch.randn(3, 2)}
    return Zero(
        [first, second],
        frozen={"frozen": torch.randn(5, 3), "still": torch.randn(1)},
        buffers={"mean": torch.randn(3), "ids": torch.arange(4)},
        tied={"head": "embedding"},
        **settings,
    )


def expected(zero: Zero) -> dict[str, Any]:
    model = {name: value for group in zero.groups for name, value in group.items()} | zero.buffers
    model |= {name: value.bfloat16() for name, value in zero.frozen.items()}
    model |= {alias: model[name] for alias, name in zero.tied.items()}
    names = [name for group in zero.groups for name in group]
    return {
        "state_dict": model,
        "optimizer_states": [
            {
                "state": {
                    name: {
                        "step": torch.tensor(7.0),
                        "exp_avg": zero.moment("exp_avg", name),
                        "exp_avg_sq": zero.moment("exp_avg_sq", name),
                    }
                    for name in names
                },
                "param_groups": [
                    {"lr": 0.1 * (index + 1), "params": list(group)} for index, group in enumerate(zero.groups)
                ],
            }
        ],
    }


def check(folder: Path, zero: Zero, tmp_path: Path) -> dict[str, Any]:
    result = convert(folder, tmp_path / "sharded", to="sharded")
    assert result.left_out == []
    nest = load(tmp_path / "sharded")
    for key, value in expected(zero).items():
        assert_same(nest[key], value, key)
    assert tied(nest["state_dict"], "embedding", "head")
    assert nest["global_step"] == 7
    return nest


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(tmp_path: Path, deepspeed_classes: Classes, stage: int, ranks: int) -> None:  # noqa: F811
    zero = make()
    zero.write(tmp_path / "zero", stage, ranks, deepspeed_classes)
    check(tmp_path / "zero", zero, tmp_path)
    assert inspect(tmp_path / "zero").world_size == ranks
    for key, value in expected(zero).items():  # the folder of the files does as well
        convert(tmp_path / "zero" / "global_step7", tmp_path / "a.ckpt", overwrite=True)
        found = torch.load(tmp_path / "a.ckpt", weights_only=True)[key]
        if key == "state_dict":
            assert_same(found, value)
        else:
            assert [group["params"] for group in found[0]["param_groups"]] == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("alignment", [1, 8])
def test_parameters_that_were_dealt_out_have_the_optimizers_order(
    tmp_path: Path,
    deepspeed_classes: Classes,  # noqa: F811
    alignment: int,
) -> None:
    zero = make(config={"round_robin_gradients": True}, alignment=alignment)
    zero.write(tmp_path / "zero", 2, 3, deepspeed_classes)
    check(tmp_path / "zero", zero, tmp_path)


def test_lightnings_dictionary_is_found(tmp_path: Path, deepspeed_classes: Classes) -> None:  # noqa: F811
    client = {
        "epoch": 4,
        "global_step": 9,
        "pytorch-lightning_version": "2.0.9",
        "loops": {"fit_loop": {}},
        "lr_schedulers": [{"last_epoch": 4}],
        "hyper_parameters": {"width": 3},
    }
    zero = make(client=client)
    zero.groups = [{f"_forward_module.{name}": value for name, value in group.items()} for group in zero.groups]
    zero.frozen, zero.buffers, zero.tied = {}, {}, {}
    zero.write(tmp_path / "last.ckpt", 3, 2, deepspeed_classes)
    convert(tmp_path / "last.ckpt", tmp_path / "file.ckpt")
    found = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert set(found["state_dict"]) == {"embedding", "weight", "scale", "none", "bias", "one", "other"}
    assert_same({key: found[key] for key in client}, client)
    summary = inspect(tmp_path / "last.ckpt")
    assert summary.writer == "DeepSpeed 0.19.8 through Lightning 2.0.9"
    assert (summary.epoch, summary.step) == (4, 9)
    assert list(summary.optimizers[0].states)[0] == "embedding"


def change(path: Path, edit: Any) -> None:
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


def test_other_optimizers_and_fused_adam(tmp_path: Path, deepspeed_classes: Classes) -> None:  # noqa: F811
    """Steps that the group counts are each parameter's; what has another size is left out, and said."""
    make().write(tmp_path / "zero", 1, 2, deepspeed_classes)
    for path in (tmp_path / "zero" / "global_step7").glob("*optim_states.pt"):

        def edit(state: dict[str, Any]) -> None:
            inner = state["optimizer_state_dict"]["base_optimizer_state"]
            for group, entry in zip(inner["param_groups"], inner["state"].values(), strict=True):
                del entry["step"]
                entry["worker_error"] = torch.zeros(2)
                group["step"] = 11

        change(path, edit)
    result = convert(tmp_path / "zero", tmp_path / "sharded", to="sharded")
    assert result.left_out == ["worker_error of the optimizer: it is not of the parameters' size"]
    (optimizer,) = load(tmp_path / "sharded")["optimizer_states"]
    assert set(optimizer["state"]["weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    steps = [entry["step"] for entry in optimizer["state"].values()]
    assert_same(steps, [torch.tensor(11.0)] * 7)
    assert "step" not in optimizer["param_groups"][0]


def test_before_the_first_step_there_is_no_state(tmp_path: Path, deepspeed_classes: Classes) -> None:  # noqa: F811
    make().write(tmp_path / "zero", 2, 2, deepspeed_classes)
    for path in (tmp_path / "zero" / "global_step7").glob("*optim_states.pt"):
        change(path, lambda state: state["optimizer_state_dict"]["base_optimizer_state"]["state"].clear())
    convert(tmp_path / "zero", tmp_path / "sharded", to="sharded")
    (optimizer,) = load(tmp_path / "sharded")["optimizer_states"]
    assert optimizer["state"] == {}
    assert optimizer["param_groups"][1] == {"lr": 0.2, "params": ["bias", "one", "other"]}


def test_what_deepspeed_keeps_in_its_own_way_is_reported(
    tmp_path: Path,
    deepspeed_classes: Classes,  # noqa: F811
) -> None:
    make(client={"lr_scheduler": {"last_batch_iteration": 3}}).write(tmp_path / "zero", 1, 1, deepspeed_classes)
    (path,) = (tmp_path / "zero" / "global_step7").glob("*optim_states.pt")
    change(path, lambda state: state["optimizer_state_dict"].update(dynamic_loss_scale=True))
    assert inspect(tmp_path / "zero").left_out == [
        "the loss scale: its state is of DeepSpeed's own kind",
        "the LR scheduler: its state is of DeepSpeed's own kind",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("latest", "hold the DeepSpeed checkpoint 'elsewhere', as its file 'latest' says"),
        ("missing optimizer rank 0", r"of each rank, but those of ranks \[0\] are missing"),
        ("missing last optimizer rank", r"files of 3 ranks, as they say, got 2"),
        ("missing optimizer files", r"\*_optim_states.pt of each rank, with the fp32 values"),
        ("missing model rank", r"as many \*_model_states.pt as \*_optim_states.pt files, got 2 and 3"),
        ("tensor parallel", "mp_rank_01_model_states.pt is a file of tensor, pipeline or expert parallelism"),
        ("pipeline parallel", "layer_00-model_states.pt is a file of tensor, pipeline or expert parallelism"),
        ("in files", "got it in the files of NVMe offload .*offload_optimizer.device: cpu"),
        ("mixed", "to have 81 elements over all ranks, as its shapes say"),
        ("no shapes", "something in it is missing or of another kind: KeyError"),
        ("no optimizer", "to hold the state of a ZeRO optimizer"),
        ("no engine", "to hold the state of a DeepSpeed engine"),
        ("elastic", "written with 'elastic_checkpoint'"),
    ],
)
def test_bad_input_is_explained(
    tmp_path: Path,
    deepspeed_classes: Classes,  # noqa: F811
    damage: str,
    message: str,
) -> None:
    make().write(tmp_path / "zero", 3 if damage == "missing model rank" else 2, 3, deepspeed_classes)
    folder = tmp_path / "zero" / "global_step7"
    optimizers, models = sorted(folder.glob("*optim_states.pt")), sorted(folder.glob("*model_states.pt"))

    def set_state(state: dict[str, Any]) -> None:
        inner = state["optimizer_state_dict"]
        if damage == "elastic":
            inner["base_optimizer_state"] = [{}, {}]
        elif damage == "no optimizer":
            inner.clear()
        else:
            inner["single_partition_of_fp32_groups"][0] = torch.zeros(3)

    if damage == "latest":
        (tmp_path / "zero" / "latest").write_text("elsewhere")
    elif damage == "missing optimizer rank 0":
        optimizers[0].unlink()
    elif damage == "missing last optimizer rank":
        optimizers[-1].unlink()
    elif damage == "missing optimizer files":
        for path in optimizers:
            path.unlink()
    elif damage == "missing model rank":
        models[-1].unlink()
    elif damage == "tensor parallel":
        torch.save({}, folder / "mp_rank_01_model_states.pt")
    elif damage == "pipeline parallel":
        torch.save({}, folder / "layer_00-model_states.pt")
    elif damage == "in files":
        (folder / "offloaded_tensors").mkdir()
    elif damage == "no shapes":
        change(models[0], lambda state: state.pop("param_shapes"))
    elif damage == "no engine":
        change(models[0], lambda state: state.clear())
    else:
        change(optimizers[0], set_state)
    with pytest.raises(ValueError, match=message):
        inspect(tmp_path / "zero")


def test_without_zero_the_model_file_has_it_all(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    state = {"module": {"weight": weight.detach()}, "optimizer": optimizer.state_dict(), "param_shapes": None}
    torch.save({**state, "global_steps": 1, "lr_scheduler": {"last_epoch": 2}}, tmp_path / "mp_rank_00_model_states.pt")
    convert(tmp_path, tmp_path.parent / "plain.ckpt", overwrite=True)
    found = torch.load(tmp_path.parent / "plain.ckpt", weights_only=True)
    assert_same(found["optimizer_states"], [optimizer.state_dict()])
    assert found["lr_schedulers"] == [{"last_epoch": 2}]
    change(tmp_path / "mp_rank_00_model_states.pt", lambda state: state.update(optimizer={"fp32_groups_flat": []}))
    assert "without ZeRO, DeepSpeed keeps them in a way of its own" in inspect(tmp_path).left_out[0]


def test_deepspeed_is_not_imported() -> None:
    real = [name for name, module in sys.modules.items() if name.partition(".")[0] == "deepspeed" and module.__spec__]
    assert real == []
