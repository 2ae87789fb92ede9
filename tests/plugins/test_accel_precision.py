"""Dtype policies in the Trainer and in Fabric, on two ranks and beside Lightning's own plugins."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import precision as fabric_plugins
from lightning.pytorch.plugins import precision as trainer_plugins
from models import Regression, Samples, alone, loader, trainer, values
from torch import Tensor, nn

from harness import Ranks
from lightning_accel import AccelPrecision, engine_of
from lightning_accel.core import GradScaler
from lightning_accel.core.placement import find_row
from lightning_accel.plugins import float8
from lightning_accel.plugins.precision import require_suitable
from lightning_accel.strategies import AccelZeROStrategy
from lightning_accel.strategies import fabric as twins
from opened import opened
from rows import everyday

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMED: dict[str, dict[str, Any]] = {
    "32-true": {},
    "16-mixed": {"compute": F16},
    "bf16-mixed": {"compute": BF16},
    "16-true": {"compute": F16, "autocast": False, "master": F16},
    "bf16-true": {"compute": BF16, "autocast": False, "master": BF16},
    "64-true": {"compute": F64},
}
"""What users of Lightning know by name, as policies."""

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao, which is not installed")


def float32() -> Any:
    return loader(dtype=F32)


def fabric(strategy: Any, **arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", strategy=strategy, **arguments)


class Seen(Regression):
    """In single precision, with plain SGD; notes dtypes."""

    def __init__(self) -> None:
        super().__init__(lr=0.1, optimizer="SGD")
        self.float()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.seen |= {("input", x.dtype), ("output", output.dtype), ("default", torch.get_default_dtype())}
        self.seen |= {("vector" if p.dim() < 2 else "matrix", p.dtype) for p in self.parameters()}
        return output

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.seen.add(("loss", loss.dtype))
        return loss


# -------------------------------------------------------------- the usual names


def fit(strategy: Any, path: Path, **arguments: Any) -> tuple[dict[str, Tensor], Any, Any]:
    torch.manual_seed(0)
    module = Seen()
    used = trainer(strategy, max_epochs=2, gradient_clip_val=0.5, **arguments)
    used.fit(module, float32())
    used.save_checkpoint(path)
    state = opened(path) if used.is_global_zero else {}
    return values(module), module.seen, state.get(type(used.precision_plugin).__qualname__)


def named_and_policy(row: str, name: str, path: Path) -> bool:
    ours, ours_seen, ours_state = fit(f"accel_{row}", path, plugins=[AccelPrecision(**NAMED[name])])
    theirs, theirs_seen, theirs_state = fit(f"accel_{row}", path, precision=name)
    assert ours_seen == theirs_seen
    assert (ours_state is not None) == (name == "16-mixed" and dist.get_rank() == 0)
    assert ours_state == theirs_state
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "name",
    [name if name.endswith("mixed") else pytest.param(name, marks=pytest.mark.matrix) for name in NAMED],
)
@pytest.mark.parametrize("row", everyday(["ddp", "zero1", "zero2", "fsdp", "fsdp_partial"]))
def test_the_usual_names_are_policies_bit_for_bit(ranks2: Ranks, row: str, name: str, tmp_path: Path) -> None:
    assert ranks2.run(named_and_policy, row, name, tmp_path / "last.ckpt") == [True, True]


def dtypes(used: Any) -> Any:
    module = Seen()
    used.fit(module, float32())
    metrics = {name: value.dtype for name, value in used.callback_metrics.items()}
    (predicted, *_) = used.predict(module, float32())
    # Under mixed precision, rows that shard optimizer state compute with 16 bits: that is what they are for.
    return {pair for pair in module.seen if pair[0] != "matrix"}, metrics, predicted.dtype


def dtypes_here(name: str) -> Any:
    return dtypes(trainer("accel_zero2", precision=name))


def stock(name: str) -> Any:
    if name == "16-mixed":  # which Lightning turns into bf16-mixed on the CPU
        scaler = torch.amp.GradScaler("cpu")
        return alone(plugins=[trainer_plugins.MixedPrecision(name, device="cpu", scaler=scaler)])
    return alone(precision=name)


@pytest.mark.parametrize("name", NAMED)
def test_dtypes_of_inputs_outputs_and_metrics_are_lightnings(ranks2: Ranks, name: str) -> None:
    assert ranks2.run(dtypes_here, name) == [dtypes(stock(name))] * 2


def dtypes_reach_the_engine(path: Path) -> tuple[set[str], set[str]]:
    plugin = AccelPrecision(compute=BF16, param=F32, reduce=F16)
    ours, seen, _ = fit("accel_zero2", path, plugins=[plugin])
    assert ("matrix", F32) in seen
    given = AccelZeROStrategy(stage=2, param_dtype=F32, reduce_dtype=F16)
    theirs, _, _ = fit(given, path, precision="bf16-mixed")
    usual, _, _ = fit("accel_zero2", path, precision="bf16-mixed")

    def unlike(others: dict[str, Tensor]) -> set[str]:
        return {name for name in ours if not torch.equal(ours[name], others[name])}

    return unlike(theirs), unlike(usual)


def test_dtypes_reach_the_engine(ranks2: Ranks, tmp_path: Path) -> None:
    for unlike_given, unlike_usual in ranks2.run(dtypes_reach_the_engine, tmp_path / "last.ckpt"):
        assert not unlike_given
        assert unlike_usual


def resumed(folder: Path) -> list[Any]:
    """A scaler's state goes from the policy to the name, and back."""
    found = []
    last = None
    for step, chosen in enumerate([{"plugins": [AccelPrecision(compute=F16)]}, {"precision": "16-mixed"}] * 2):
        used = trainer("accel_zero2", max_epochs=2 + step, limit_train_batches=2, **chosen)
        if last is None:
            used.scaler.update(2.0**10)
        used.fit(Seen(), float32(), ckpt_path=last)
        used.save_checkpoint(last := folder / f"{step}.ckpt")
        found.append((used.scaler.get_scale(), used.scaler.state_dict()["_growth_tracker"]))
    return found


def test_a_scalers_state_is_found_by_the_policy_and_by_the_name(ranks2: Ranks, tmp_path: Path) -> None:
    expected = [(2.0**10, steps) for steps in (4, 6, 8, 10)]
    assert ranks2.run(resumed, tmp_path) == [expected] * 2


# ------------------------------------------------------------- masters, no autocast


def by_hand(ranks: int, steps: int) -> dict[str, Tensor]:
    """Forward and backward in bf16 for each rank's share, gradients added up and weights updated in fp32."""
    master = Seen().net
    samples = Samples(dtype=F32)
    for step in range(steps):
        sums = [torch.zeros_like(p) for p in master.parameters()]
        for rank in range(ranks):
            rounded = copy.deepcopy(master).to(BF16)
            share = range(8 * step % len(samples) + rank, 8 * step % len(samples) + 8, ranks)
            x, y = (torch.stack(part) for part in zip(*[samples[i][1:] for i in share], strict=True))
            nn.functional.mse_loss(rounded(x.to(BF16)), y.to(BF16)).backward()
            for total, parameter in zip(sums, rounded.parameters(), strict=True):
                assert parameter.grad is not None
                total += parameter.grad.float()
        with torch.no_grad():
            for parameter, total in zip(master.parameters(), sums, strict=True):
                parameter -= 0.1 * 0.97**step * total / ranks  # the rate of models.Regression
    return {f"net.{name}": p.detach() for name, p in master.named_parameters()}


def converted(row: str) -> Any:
    module = Seen()
    used = trainer(f"accel_{row}", max_epochs=2, plugins=[AccelPrecision(compute=BF16, autocast=False)])
    used.fit(module, float32())
    used.validate(module, float32(), verbose=False)
    assert {p.dtype for p in module.parameters()} == {F32}
    return values(module), module.seen, used.callback_metrics["val_loss"].dtype


@pytest.mark.parametrize("row", everyday(["zero1", "zero2", "fsdp", "fsdp_partial"]))
def test_without_autocast_all_is_narrow_but_what_is_updated(ranks2: Ranks, row: str) -> None:
    expected, start = by_hand(2, 8), values(Seen())
    for result, seen, metric in ranks2.run(converted, row):
        names = ("input", "output", "default", "vector", "matrix", "loss")
        assert seen == {(name, BF16) for name in names}
        assert metric is F32
        for name, value in expected.items():
            assert (value - start[name]).norm() > 0.01
            # The same roundings to bf16; products with the learning rate are rounded to fp32 in other places.
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6)


class Shared(Seen):
    """With a part that two others hold, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        angles = nn.Module()
        angles.register_buffer("angles", torch.ones(5))
        self.holders = nn.ModuleList([nn.ModuleList([angles]), nn.ModuleList([angles])])

    def forward(self, x: Tensor) -> Tensor:
        angles = self.holders[1][0].angles
        self.seen.add(("buffer", angles.dtype))
        return super().forward(self.norm(x * angles))


def given_back(row: str) -> tuple[set[tuple[str, torch.dtype]], set[torch.dtype], torch.dtype, torch.dtype]:
    module = Shared()
    plugin = AccelPrecision(compute=BF16, autocast=False)
    trainer(f"accel_{row}", plugins=[plugin]).fit(module, float32())
    dtypes = {t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()}
    return module.seen, dtypes, module.dtype, module(torch.ones(2, 5)).dtype


@pytest.mark.parametrize("row", everyday(["zero2", "fsdp"]))
def test_a_module_is_given_back_in_one_dtype(ranks2: Ranks, row: str) -> None:
    for seen, dtypes, dtype, output in ranks2.run(given_back, row):
        assert ("buffer", BF16) in seen
        assert (dtypes, dtype, output) == ({F32}, F32, F32)


def in_fabric(row: str, **settings: Any) -> Any:
    made = fabric(f"accel_{row}", devices=2, **settings)
    made.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32))
    model, optimizer = made.setup(net, torch.optim.AdamW(net.parameters()))
    seen: set[Any] = set()
    net.register_forward_pre_hook(lambda _, x: seen.update([x[0].dtype, *(p.dtype for p in net.parameters())]))
    for _ in range(3):
        optimizer.zero_grad()
        output = model(torch.randn(4, 32))
        made.backward(output.square().mean())
        made.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
    with engine_of(net).full_parameters():
        return seen, output.dtype, [p.detach().clone() for p in net.parameters()]


def named_and_policy_in_fabric(row: str, name: str) -> bool:
    seen, output, ours = in_fabric(row, plugins=[AccelPrecision(**NAMED[name])])
    seen_by_name, output_by_name, theirs = in_fabric(row, precision=name)
    assert (seen, output) == (seen_by_name, output_by_name)
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", ["16-mixed", pytest.param("bf16-mixed", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_fabric_has_the_same_policies(ranks2: Ranks, row: str, name: str) -> None:
    assert ranks2.run(named_and_policy_in_fabric, row, name) == [True, True]


def converted_in_fabric(row: str) -> Any:
    seen, output, found = in_fabric(row, plugins=[AccelPrecision(compute=BF16, autocast=False)])
    return seen, output, {value.dtype for value in found}


@pytest.mark.parametrize("row", everyday(["zero2", "fsdp"]))
def test_fabric_without_autocast(ranks2: Ranks, row: str) -> None:
    assert ranks2.run(converted_in_fabric, row) == [({BF16}, F32, {F32})] * 2


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize("make", [trainer, fabric])
@pytest.mark.parametrize("family", ["trainer", "fabric"])
@pytest.mark.parametrize("name", ["FSDPPrecision", "DeepSpeedPrecision"])
def test_plugins_of_other_strategies_are_refused(make: Any, family: str, name: str) -> None:
    plugin = getattr(trainer_plugins if family == "trainer" else fabric_plugins, name)("bf16-mixed")
    if make is trainer and family == "fabric":
        pytest.skip("the Trainer says itself that it takes no plugins of Fabric's")
    with pytest.raises(ValueError, match=f"got {name}, which is for strategy=.*AccelPrecision"):
        make("accel_zero2", devices=1, plugins=[plugin])


def test_quantised_parameters_cannot_be_cut() -> None:
    plugin = object.__new__(trainer_plugins.BitsandbytesPrecision)
    require_suitable(plugin, find_row("zero2"))
    with pytest.raises(ValueError, match="Expected floating-point parameters for strategy='accel_fsdp'"):
        require_suitable(plugin, find_row("fsdp"))


@pytest.mark.parametrize("module", ["trainer", "fabric"])
def test_what_row_and_strategy_contradict_is_refused_at_once(module: str) -> None:
    def make(strategy: Any, **settings: Any) -> None:
        plugins = [AccelPrecision(**settings)]
        if module == "trainer":
            trainer(strategy, devices=1, plugins=plugins)
        else:
            fabric(strategy, devices=1, plugins=plugins)

    kind = AccelZeROStrategy if module == "trainer" else twins.AccelZeROStrategy
    with pytest.raises(ValueError, match="Expected param_dtype for rows that shard optimizer state only"):
        make("accel_ddp", compute=BF16, param=BF16)
    with pytest.raises(
        ValueError, match=r"one param dtype, got param_dtype=torch.float32 with the strategy and torch.bf"
    ):
        make(kind(stage=2, param_dtype=F32), compute=BF16, param=BF16)
    with pytest.raises(ValueError, match=r"Expected one reduce dtype, got reduce_dtype=torch.bfloat16"):
        make(kind(stage=2, reduce_dtype=BF16), compute=BF16, reduce=F32)
    for settings in ({}, {"compute": F16, "autocast": False, "master": F16}):
        scaled = kind(stage=2, grad_scaler=GradScaler("static", init_scale=4.0))
        with pytest.raises(ValueError, match="together with grad_scaler, got '(32|16)-true'"):
            make(scaled, **settings)
    make("accel_ddp", compute=BF16, param=F32)
    make(kind(stage=2, param_dtype=F32), compute=BF16)
    make(kind(stage=2, reduce_dtype=F32), compute=BF16, reduce=F32)


# ------------------------------------------------------------------------ fp8


@pytest.mark.parametrize("make", [trainer, fabric])
def test_fp8_is_a_name_for_these_strategies_only(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-accel\[fp8\]"):
        make("accel_zero2", devices=1, precision="fp8-mixed")
    monkeypatch.setattr(float8, "find_spec", lambda _: "found")
    with pytest.raises(ValueError, match="Expected a CUDA device of capability 8.9 or more"):
        make("accel_zero2", devices=1, precision="fp8-mixed", plugins=[])
    with pytest.raises(ValueError, match="'fp8-mixed' is invalid"):
        make("ddp", devices=1, precision="fp8-mixed")


def emulated(row: str) -> Any:
    """fp8 by torchao's emulation, which computes in bf16 with numbers that were rounded to fp8."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    def losses(**settings: Any) -> tuple[list[float], nn.Module]:
        made = fabric(f"accel_{row}", devices=2, **settings)
        made.launch()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))
        model, optimizer = made.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        found = []
        x = torch.randn(16, 32)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :3]).square().mean()
            made.backward(loss)
            optimizer.step()
            found.append(loss.item())
        return found, net

    config = Float8LinearConfig(emulate=True)
    rounded, net = losses(plugins=[AccelPrecision(compute=BF16, fp8=config)])
    usual, _ = losses(precision="bf16-mixed")
    return rounded, usual, [isinstance(part, Float8Linear) for part in net if isinstance(part, nn.Linear)]


@needs_torchao
@pytest.mark.parametrize("row", everyday(["ddp", "zero2", "fsdp"]))
def test_fp8_trains(ranks2: Ranks, row: str) -> None:
    for rounded, usual, kinds in ranks2.run(emulated, row):
        assert kinds == [True, True, False]  # 3 is no multiple of 16
        assert rounded != usual
        assert rounded[-1] < 0.5 * rounded[0]
        assert rounded == pytest.approx(usual, rel=0.2)  # e4m3 has 4 bits


@needs_torchao
@pytest.mark.cuda
def test_fp8_trains_on_cuda() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"needs a CUDA device of capability 8.9, got {torch.cuda.get_device_capability()}")
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    made = Fabric(accelerator="cuda", devices=1, strategy="accel_zero2", precision="fp8-mixed")
    made.launch()
    model, optimizer = made.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    x = torch.randn(16, 32, device=made.device)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        made.backward(loss)
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.5 * found[0]
