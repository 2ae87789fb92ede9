"""Under mixed precision, rows that shard optimizer state compute with rounded matrices and update precise ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import callbacks as lightning_callbacks
from models import Regression, alone, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel import engine_of
from lightning_accel.callbacks import EMAWeightAveraging
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy
from lightning_accel.strategies import fabric as twins
from opened import opened
from rows import everyday

MIXED = ["zero1", "zero2", "fsdp", "fsdp_partial"]
# As in test_float16.py, with the 8 bits that bf16 carries: gradients are rounded on each rank, and once in a single
# process.
HALF = 4 * 2.0**-8


class Seen(Regression):
    """In single precision; notes what its parameters are in forward."""

    def __init__(self) -> None:
        super().__init__(lr=0.1, optimizer="SGD")
        self.float()
        self.dtypes: set[tuple[int, torch.dtype]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes |= {(p.dim(), p.dtype) for p in self.parameters()}
        return super().forward(x)


def float32() -> Any:
    return loader(dtype=torch.float32)


def fit(strategy: Any, path: Path, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
    module = Seen()
    used = trainer(strategy, precision="bf16-mixed", max_epochs=4 if ckpt_path else 3, gradient_clip_val=0.5)
    used.fit(module, float32(), ckpt_path=ckpt_path)
    used.save_checkpoint(path)
    saved = opened(path)["state_dict"] if used.is_global_zero else {}
    return values(module), module.dtypes, saved


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    def flat(state: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten().double() for value in state.values()])

    moved = (flat(theirs) - flat(start)).norm()
    assert moved > 0.05, "training changed nothing: the comparison is void"
    return float((flat(ours) - flat(theirs)).norm() / moved)


@pytest.mark.parametrize("row", everyday(MIXED))
def test_matrices_are_rounded_and_what_is_updated_and_saved_is_not(ranks2: Ranks, row: str, tmp_path: Path) -> None:
    start = values(Seen())
    expected = Seen()
    used = alone(precision="bf16-mixed", max_epochs=3, gradient_clip_val=0.5)
    used.fit(expected, float32())
    used.save_checkpoint(tmp_path / "alone.ckpt")
    for rank, (result, dtypes, saved) in enumerate(ranks2.run(fit, f"accel_{row}", tmp_path / "last.ckpt")):
        assert dtypes == {(2, torch.bfloat16), (1, torch.float32)}
        assert {value.dtype for value in result.values()} == {torch.float32}
        assert 0 < error(result, values(expected), start) < HALF
        if rank == 0:
            assert saved.keys() == result.keys()
            assert all(torch.equal(saved[name], result[name]) for name in saved)
    # A checkpoint of Lightning's own goes on here, and one of ours there.
    longer = alone(precision="bf16-mixed", max_epochs=4, gradient_clip_val=0.5)
    longer.fit(again := Seen(), float32(), ckpt_path=tmp_path / "last.ckpt")
    for result, _, _ in ranks2.run(fit, f"accel_{row}", tmp_path / "more.ckpt", tmp_path / "alone.ckpt"):
        assert error(result, values(again), start) < 2 * HALF


def precise() -> set[tuple[int, torch.dtype]]:
    strategy = AccelZeROStrategy(stage=2, param_dtype=torch.float32)
    trainer(strategy, precision="bf16-mixed").fit(module := Seen(), float32())
    return module.dtypes


def test_rounding_may_be_left_to_autocast(ranks2: Ranks) -> None:
    assert ranks2.run(precise) == [{(2, torch.float32), (1, torch.float32)}] * 2


def averaged(row: str, kind: type) -> None:
    used = trainer(f"accel_{row}", precision="bf16-mixed", callbacks=[kind(decay=0.9)])
    used.fit(Seen(), float32())


def test_averages_of_rounded_values_are_refused(ranks2: Ranks) -> None:
    ranks2.run(averaged, "zero2", EMAWeightAveraging)
    for found in ranks2.run_expecting_error(averaged, "zero2", lightning_callbacks.EMAWeightAveraging):
        assert found is not None
        assert "precise values of parameters which mixed precision has rounded" in found[1]
        assert "Use (or derive from) lightning_accel.callbacks.EMAWeightAveraging" in found[1]


def fit_in_fabric(row: str) -> tuple[set[tuple[int, torch.dtype]], list[torch.dtype], int]:
    made = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}", precision="bf16-mixed")
    made.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model, optimizer = made.setup(net, torch.optim.AdamW(net.parameters()))
    seen: set[tuple[int, torch.dtype]] = set()
    net.register_forward_pre_hook(lambda *_: seen.update((p.dim(), p.dtype) for p in net.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        made.backward(model(torch.randn(4, 32)).square().mean())
        made.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with (engine := engine_of(net)).full_parameters():
            dtypes = [value.dtype for value in model.state_dict().values()]
    assert not [str(warning.message) for warning in caught if "rounded" in str(warning.message)]
    if row.startswith("zero"):
        with pytest.warns(UserWarning, match="rounded to 16 bits"):
            model.state_dict()
    return seen, dtypes, engine.report().at_rest["master_parameters"]


@pytest.mark.parametrize("row", everyday(MIXED))
def test_fabric(ranks2: Ranks, row: str) -> None:
    outcomes = ranks2.run(fit_in_fabric, row)
    assert outcomes[0][1] == [torch.float32] * 4
    for seen, _, masters in outcomes:
        assert seen == {(2, torch.bfloat16), (1, torch.float32)}
        assert masters == 4 * 2 * 32 * 32 / 2


@pytest.mark.parametrize("module", ["trainer", "fabric"])
def test_mistakes_are_refused_at_once(module: str) -> None:
    ddp, fsdp, zero = (
        (AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy)
        if module == "trainer"
        else (twins.AccelDDPStrategy, twins.AccelFSDPStrategy, twins.AccelZeROStrategy)
    )
    with pytest.raises(ValueError, match="Expected param_dtype for rows that shard optimizer state only"):
        ddp(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Expected reduce_dtype to be a floating-point dtype"):
        fsdp(reduce_dtype=torch.int32)
    with pytest.raises(ValueError, match="Expected reduce_dtype to be a floating-point dtype"):
        zero(stage=1, reduce_dtype=torch.int32)


def sent_by_ddp(dtype: torch.dtype | None) -> int:
    made = Fabric(accelerator="cpu", devices=2, strategy=twins.AccelDDPStrategy(reduce_dtype=dtype))
    made.launch()
    net = nn.Linear(32, 32)
    model, optimizer = made.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    made.backward(model(torch.randn(4, 32)).square().mean())
    optimizer.step()
    return int(engine_of(net).report().bytes_sent["all_reduce"])


def test_ddp_sends_half(ranks2: Ranks) -> None:
    whole, half = ranks2.run(sent_by_ddp, None), ranks2.run(sent_by_ddp, torch.bfloat16)
    assert whole[0] >= 4 * (32 * 32 + 32)
    assert [2 * sent for sent in half] == whole
