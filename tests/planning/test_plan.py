"""What plans say, of which models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_accel
from lightning_accel.planning import Plan, RowPlan, plan
from lightning_accel.planning.ledger import KINDS, Course
from planning.gpt import Gpt

TOKENS = torch.empty(2, 16, dtype=torch.long, device="meta")


def gpt() -> Gpt:
    return Gpt(64, 3, 4, 100, 16)


def small(**options: Any) -> Plan:
    settings: dict[str, Any] = {"batch": TOKENS, "optimizer": torch.optim.AdamW, "rows": ["zero2"], **options}
    return plan(settings.pop("model", gpt), **{"checkpointing": False, **settings})


def row(name: str, peak: int, wire: int, *, checkpointing: bool = False) -> RowPlan:
    moment = {**dict.fromkeys(KINDS, 0), "parameters": peak}
    return RowPlan(
        row=name,
        checkpointing=checkpointing,
        at_rest=moment,
        peak=moment,
        most=moment,
        bytes_sent={"all_gather": wire},
        collectives={"all_gather": 1},
        course=Course([moment, moment], ["forward", "backward"]),
    )


def planned(memory: int | None, *rows: RowPlan) -> Plan:
    return Plan(model="M", parameters=1, ranks=4, shard_size=4, precision="32-true", memory=memory, rows=rows)


DDP, ZERO2, FSDP = row("ddp", 1000, 200), row("zero2", 500, 201), row("fsdp", 100, 300)
FSDP_RECOMPUTING = row("fsdp", 50, 300, checkpointing=True)
ZERO2_RECOMPUTING = row("zero2", 90, 201, checkpointing=True)
ALL = (FSDP_RECOMPUTING, FSDP, DDP, ZERO2, ZERO2_RECOMPUTING)


@pytest.mark.parametrize(
    ("memory", "order"),
    [
        (None, [ZERO2, DDP, ZERO2_RECOMPUTING, FSDP, FSDP_RECOMPUTING]),
        (499, [ZERO2_RECOMPUTING, FSDP, FSDP_RECOMPUTING]),
        (100, [ZERO2_RECOMPUTING, FSDP, FSDP_RECOMPUTING]),
        (89, [FSDP_RECOMPUTING]),
        (49, []),
    ],
)
def test_the_cheapest_that_fits_sends_least(memory: int | None, order: list[RowPlan]) -> None:
    found = planned(memory, *ALL)
    assert found.fitting() == order
    assert found.best is (order[0] if order else None)


def test_the_reason_is_one_line() -> None:
    assert planned(600, DDP, ZERO2).why() == (
        "accel_zero2: 500 B of 600 B at the peak on each of 4 ranks, and 201 B sent per step (too large: accel_ddp"
        " 1.00 KB)"
    )
    assert planned(None, FSDP).why() == "accel_fsdp: 100 B at the peak on each of 4 ranks, and 300 B sent per step"
    assert planned(10, DDP, FSDP_RECOMPUTING).why() == (
        "No row fits 10 B: accel_fsdp + checkpointing needs least, 50 B on each of 4 ranks. Use more ranks, a smaller"
        " batch, or offload='optimizer'."
    )


def test_every_row_both_ways() -> None:
    found = lightning_accel.plan(gpt, batch=TOKENS, optimizer=torch.optim.AdamW, ranks=16, memory="1GB")
    names = ["ddp", "zero1", "zero2", "fsdp_partial", "fsdp", "fsdp_hybrid"]
    assert [(r.row, r.checkpointing) for r in found.rows] == [(name, way) for name in names for way in (False, True)]
    assert found.shard_size == 8
    size = 4 * found.parameters
    assert found.parameters == sum(p.numel() for p in gpt().parameters())
    for planned_row in found.rows:
        assert planned_row.peak_bytes >= planned_row.rest_bytes
        assert planned_row.wire_bytes > size
        assert all(planned_row.most[kind] >= planned_row.peak[kind] for kind in KINDS)
    without, recomputing = found.rows[4:6]
    assert recomputing.most["activations"] < without.most["activations"]
    assert recomputing.at_rest == without.at_rest
    assert found.best is not None
    text = str(found)
    assert "accel_fsdp_hybrid + checkpointing" in text
    assert f"* {found.why()}" in " ".join(text.split())
    data = json.loads(json.dumps(found.to_dict()))
    assert data["best"] == {"row": found.best.row, "checkpointing": found.best.checkpointing}
    assert data["rows"][0]["peak_bytes"] == found.rows[0].peak_bytes


def test_hybrid_is_left_out_where_it_is_full_sharding() -> None:
    rows = ["fsdp", "fsdp_hybrid"]
    settings: dict[str, Any] = {"batch": TOKENS, "optimizer": torch.optim.AdamW, "checkpointing": False, "rows": rows}
    assert [r.row for r in plan(gpt, ranks=4, **settings).rows] == ["fsdp"]
    assert [r.row for r in plan(gpt, ranks=4, shard_size=2, **settings).rows] == rows


def test_progress_is_told_before_each_row() -> None:
    told: list[tuple[str, int, int]] = []
    settings: dict[str, Any] = {"batch": TOKENS, "optimizer": torch.optim.AdamW, "rows": ["ddp", "fsdp"], "ranks": 4}
    plan(gpt, checkpointing=True, progress=lambda *moment: told.append(moment), **settings)
    assert told == [("accel_ddp + checkpointing", 0, 2), ("accel_fsdp + checkpointing", 1, 2)]


def test_a_picture(tmp_path: Path) -> None:
    small(memory="1MB").draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = gpt()
        self.mask = torch.ones(3)  # neither a parameter nor a buffer

    def training_step(self, batch: Tensor, index: int) -> dict[str, Tensor]:
        loss = self.net(batch) * self.mask.mean()
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() < 2]
        optimizer = torch.optim.SGD([{"params": decayed}, {"params": others, "weight_decay": 0.0}], momentum=0.9)
        steps = self.trainer.estimated_stepping_batches // self.trainer.world_size
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, steps)]


def test_a_lightning_module_is_used_as_it_is() -> None:
    module = Lit()
    before = dict(module.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    found = small(model=module, optimizer=None, rows=["ddp"]).rows[0]
    size = 4 * sum(p.numel() for p in module.parameters())
    assert size <= found.at_rest["optimizer_state"] <= 1.01 * size  # momentum only
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, values[name])
        assert type(parameter) is nn.Parameter
    assert small(model=Lit, optimizer=None, rows=["ddp"]).rows[0].at_rest == found.at_rest


class AsksTheTrainer(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.trainer.model.lr)


def test_what_only_a_trainer_knows_is_said() -> None:
    with pytest.raises(ValueError, match=r"to need no Trainer, but there is no trainer.model .* Give optimizer="):
        small(model=AsksTheTrainer, optimizer=None)
    assert small(model=AsksTheTrainer).rows


def test_batches_of_all_kinds_and_outputs_with_a_loss() -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: float = 1.0) -> Output:
            return Output((self.linear(x) * scale).square().mean())

    x = torch.empty(3, 8, device="meta")
    found = [
        small(model=Net, batch=batch).rows[0]
        for batch in (x, (x,), [x, 2.0], {"x": x, "scale": 2.0}, (torch.zeros(3, 8),))
    ]
    assert len({one.wire_bytes for one in found}) == 1
    given = plan(lambda: (Net(), x), optimizer=torch.optim.AdamW, rows=["zero2"], checkpointing=False).rows[0]
    assert given == found[0]


@pytest.mark.parametrize(
    ("precision", "row_name", "parameters", "masters"),
    [
        ("32-true", "fsdp", 4, 0),
        ("64-true", "fsdp", 8, 0),
        ("bf16-true", "zero2", 2, 0),
        ("16", "ddp", 4, 0),
        ("bf16-mixed", "ddp", 4, 0),
    ],
)
def test_precisions(precision: str, row_name: str, parameters: int, masters: int) -> None:
    found = small(precision=precision, rows=[row_name], ranks=1)
    count = found.parameters
    rest = found.rows[0].at_rest
    assert parameters * count <= rest["parameters"] <= 1.01 * parameters * count
    assert rest["master_parameters"] == masters


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum() > 0:  # this very line
            y = -y
        return y.mean()


def test_a_model_that_looks_at_values_is_told_where() -> None:
    with pytest.raises(ValueError, match=r"needs no values of tensors.*test_plan.py:\d+: if y.sum\(\) > 0"):
        small(model=LooksAtValues(), batch=torch.zeros(3, 8))


class Impatient(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        if self.param_groups[0]["params"][0].grad.sum() > 0:
            super().step()


def test_what_else_goes_wrong_in_the_users_code_is_told() -> None:
    with pytest.raises(ValueError, match="an optimizer whose step needs no values.*grad.sum"):
        small(optimizer=Impatient, rows=["ddp"])
    with pytest.raises(ValueError, match="forward runs without values of tensors, but it raised RuntimeError: .*Is"):
        small(batch=torch.empty(2, 16))  # an embedding of numbers that are no integers


def vision() -> nn.Module:
    rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
    return nn.Sequential(*(nn.Linear(2, 2) for _ in rates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": None}, r"Expected a batch, as what forward keeps .* Give batch="),
        ({"optimizer": None}, r"Expected an optimizer for Gpt, which has no configure_optimizers\(\)"),
        ({"ranks": 0}, "Expected at least one rank, got 0"),
        ({"rows": "zero2"}, "Expected `rows` to be a list of names, got 'zero2'"),
        ({"rows": ["zero9"]}, "Expected one of the placement rows"),
        ({"rows": []}, "Expected at least one row"),
        ({"shard_size": 2}, "Expected shard_size together with the row 'fsdp_hybrid', got 2"),
        ({"rows": ["fsdp_hybrid"], "shard_size": 3}, "got 3 for 8 ranks"),
        ({"precision": "8-mixed"}, "Expected precision to be one of"),
        ({"memory": "plenty"}, "Expected a size such as '5GB'"),
        ({"model": vision}, "Expected vision to make its model on the meta device"),
        ({"model": lambda: (gpt(), TOKENS)}, "Expected one batch, got one as an argument and another"),
        ({"model": lambda: nn.Linear(2, 2).requires_grad_(False)}, "to have parameters to train, got none"),
        ({"model": lambda: nn.Linear(16, 2), "batch": torch.empty(2, 16)}, "Expected Linear to return a loss"),
        (
            {"model": lambda: nn.Linear(16, 2), "checkpointing": True, "batch": torch.empty(2, 16)},
            "Expected the model to have repeated blocks",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("model", [3, lambda: 3])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match="Expected a"):
        small(model=model)


def test_several_processes_find_the_same() -> None:
    rows = ["ddp", "zero2", "fsdp"]
    alone, together = small(rows=rows), small(rows=rows, processes=2)
    assert together.to_dict() == alone.to_dict()
    assert [row.course.peak for row in together.rows] == [row.course.peak for row in alone.rows]
    with pytest.raises(ValueError, match="Expected at least one process, got 0"):
        small(processes=0)


def test_what_a_process_finds_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="Expected a model whose forward"):
        small(model=nn.Linear(2, 2), batch=(torch.zeros(3, 5),), processes=2, rows=["ddp", "zero2"])
