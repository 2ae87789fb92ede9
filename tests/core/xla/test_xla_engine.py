"""The engine on a virtual mesh of four CPU devices, beside plain torch on the same global batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.core.placement import ROWS, Rest
from lightning_accel.core.xla import XLAEngine
from lightning_accel.core.xla.shardings import elements_on_one, replicated, sharded

pytestmark = pytest.mark.xla

DEVICES, SAMPLES, STEPS = 4, 16, 20
DISTINCT = ["ddp", "zero1", "zero2", "fsdp", "fsdp_hybrid"]
"""``zero3`` and ``fsdp_partial`` are ``fsdp`` here: what is kept until backward is for the compiler to say."""
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Sizes that no number of devices divides. No GELU: XLA's has constants of single precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width + 3), nn.Linear(4 * width + 3, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Token classification: a tied matrix, a frozen one, one that is not used, a scalar, a buffer."""

    def __init__(self, width: int = 30, words: int = 17) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(x))


@dataclass(frozen=True)
class Run:
    """How a model is trained."""

    optimizer: Optimizer
    put: Callable[[Batch], Batch] = lambda batch: batch
    backward: Callable[[Tensor], None] = lambda loss: loss.backward()
    no_sync: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batches(count: int, samples: int = SAMPLES) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(17, (samples, 5), generator=generator), torch.randint(17, (samples,), generator=generator))
        for _ in range(count)
    ]


def adamw(model: nn.Module) -> Optimizer:
    # eps of the gradients' own order: the update of what hardly matters should not hang on its sign.
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3, eps=1e-5)


def train(
    model: nn.Module, run: Run, *, accumulate: int = 1, clip: float | None = None, autocast: str | None = None
) -> list[float]:
    data = iter(batches(STEPS * accumulate))
    losses = []
    for _ in range(STEPS):
        run.optimizer.zero_grad()
        total = torch.zeros(())
        for index in range(accumulate):
            tokens, targets = run.put(next(data))
            with contextlib.nullcontext() if autocast is None else torch.autocast(autocast, torch.bfloat16):
                logits = model(tokens)[:, -1]
            loss = (
                nn.functional.cross_entropy(logits.to(total.dtype if autocast else logits.dtype), targets) / accumulate
            )
            with run.no_sync() if index < accumulate - 1 else contextlib.nullcontext():
                run.backward(loss)
            total = total.to(loss.device) + loss.detach()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
        run.optimizer.step()
        losses.append(total)
    return [float(loss) for loss in losses]


def shard_size(row: str) -> int | None:
    return 2 if ROWS[row].hybrid else None


def both(row: str, dtype: torch.dtype, **settings: object) -> tuple[float, float]:
    """The largest relative difference of a loss, and of all parameters in norm."""
    ours, theirs = net(dtype), net(dtype)
    engine = XLAEngine(ours, row, shard_size=shard_size(row))
    run = Run(adamw(ours), engine.put_batch, engine.backward, engine.no_sync)
    engine.add_optimizer(run.optimizer)
    cast = settings.pop("autocast", False)
    found = train(ours, run, autocast="xla" if cast else None, **settings)  # type: ignore[arg-type]
    wanted = train(theirs, Run(adamw(theirs)), autocast="cpu" if cast else None, **settings)  # type: ignore[arg-type]
    flat = [torch.cat([p.detach().cpu().flatten() for p in model.parameters()]) for model in (ours, theirs)]
    assert wanted[-1] < wanted[0], "it learns"
    return (
        max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)),
        float((flat[0] - flat[1]).norm() / flat[1].norm()),
    )


SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"accumulate": 3}, id="accumulation"),
    pytest.param({"clip": 0.3}, id="clipping"),
    pytest.param({"accumulate": 2, "clip": 0.3}, id="both"),
]


@pytest.mark.parametrize("row", DISTINCT)
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_one_device_in_float64(row: str, settings: dict[str, object]) -> None:
    loss, parameters = both(row, torch.float64, **settings)
    assert loss < 1e-12
    assert parameters < 1e-12


@pytest.mark.parametrize("row", ROWS)
def test_equals_one_device_in_float32(row: str) -> None:
    loss, parameters = both(row, torch.float32, accumulate=2, clip=0.3)
    assert loss < 1e-5
    assert parameters < 1e-5


@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_bf16_mixed_is_within_its_rounding(row: str) -> None:
    loss, _ = both(row, torch.float32, autocast=True, accumulate=2, clip=0.3)
    assert loss < 2**-7  # bf16 has 8 bits: products are rounded to 2^-9 of themselves, in another order


@pytest.mark.parametrize("row", ROWS)
def test_bytes_at_rest_are_those_of_the_table(row: str) -> None:
    model = net(torch.float32)
    engine = XLAEngine(model, row, shard_size=shard_size(row))
    run = Run(adamw(model), engine.put_batch, engine.backward, engine.no_sync)
    engine.add_optimizer(run.optimizer)
    train(model, run)
    parts = shard_size(row) or DEVICES

    def expected(tensors: list[nn.Parameter], rest: Rest) -> int:
        spec = replicated if rest is Rest.REPLICATED else lambda shape: sharded(shape, parts)
        return sum(4 * elements_on_one(t.shape, spec(t.shape), parts) for t in tensors)

    trained = [p for p in model.parameters() if p.grad is not None]
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert len(trainable) - len(trained) == 2, "the module that is not used"
    assert len(frozen) == 2
    table = ROWS[row]
    assert engine.report().at_rest == {
        "parameters": expected(trainable, table.parameters),
        "frozen_parameters": expected(frozen, table.parameters),
        "gradients": expected(trained, table.gradients),
        "optimizer_state": 2 * expected(trained, table.optimizer_state),
        "buffers": 4 * 30,
    }


def test_adam_on_one_device_is_a_quarter() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
    whole = 2 * sum(4 * p.numel() for p in model.parameters())
    engine = XLAEngine(model, "zero1")
    optimizer = torch.optim.Adam(model.parameters())
    engine.add_optimizer(optimizer)
    engine.backward(model(engine.put_batch(torch.ones(4, 32))).sum())
    optimizer.step()
    assert engine.report().at_rest["optimizer_state"] == whole // 4


@pytest.mark.parametrize("row", ["ddp", "zero1", "fsdp"])
def test_nothing_is_compiled_after_the_second_step(row: str) -> None:
    model = net(torch.float32)
    engine = XLAEngine(model, row)
    optimizer = adamw(model)
    engine.add_optimizer(optimizer)
    compiled = []
    for tokens, targets in [*batches(6), *batches(2, samples=8), *batches(4), *batches(1, samples=8)]:
        optimizer.zero_grad()
        tokens, targets = engine.put_batch((tokens, targets))
        engine.backward(nn.functional.cross_entropy(model(tokens)[:, -1], targets))
        optimizer.step()
        compiled.append(engine.compilations)
    # The first step makes the optimizer's state, the second finds it there; a short batch is a program more.
    assert compiled == [1] + [2] * 5 + [3] * 7
    assert engine.report().compilations == 3


def test_shared_parameters_stay_shared_and_names_stay() -> None:
    model = net(torch.float32)
    names = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    engine = XLAEngine(model, "fsdp")
    assert model.head.weight is model.embed.weight
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == names
    engine.put_batch(batches(1)[0])
    model(engine.put_batch(batches(1)[0])[0])
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == names


def test_parameters_are_back_after_a_forward_that_fails() -> None:
    model = net(torch.float32)
    engine = XLAEngine(model, "fsdp")
    before = list(model.parameters())
    with pytest.raises((RuntimeError, ValueError)):
        model(engine.put_batch(torch.ones(4, 3)))  # no tokens
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_after_close_the_module_is_left_alone() -> None:
    model = net(torch.float32)
    engine = XLAEngine(model, "fsdp")
    optimizer = adamw(model)
    engine.add_optimizer(optimizer)
    hooks = [len(part._forward_pre_hooks) for part in model.modules()]
    assert sum(hooks)
    engine.close()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert not optimizer._optimizer_step_post_hooks


def steps(engine: XLAEngine, optimizer: Optimizer, count: int) -> None:
    for tokens, targets in batches(count):
        optimizer.zero_grad()
        tokens, targets = engine.put_batch((tokens, targets))
        engine.backward(nn.functional.cross_entropy(engine.module(tokens)[:, -1], targets))
        optimizer.step()


@pytest.mark.parametrize("row", ["ddp", "zero2", "fsdp"])
def test_all_comes_home_and_goes_on_from_there(row: str) -> None:
    ours, theirs = net(torch.float64), net(torch.float64)
    for model, parts in ((ours, (2, 3)), (theirs, (2,))):
        state = None
        for count in parts:
            engine = XLAEngine(model, row)
            optimizer = adamw(model)
            engine.add_optimizer(optimizer)
            if state is not None:
                engine.load_optimizer_state(optimizer, state)
                loaded = engine.report().at_rest["optimizer_state"]
            steps(engine, optimizer, count)
            if state is not None:
                assert engine.report().at_rest["optimizer_state"] == loaded
            engine.bring_home()
            assert engine.is_closed
            assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
            assert model.head.weight is model.embed.weight
            assert set(optimizer.state) <= set(model.parameters())
            state = optimizer.state_dict()
            assert {v.device.type for s in state["state"].values() for v in s.values()} == {"cpu"}
    optimizer = adamw(theirs)
    optimizer.load_state_dict(state)  # two steps on the devices, three on the CPU
    train_on_cpu = Run(optimizer)
    for tokens, targets in batches(3):
        optimizer.zero_grad()
        train_on_cpu.backward(nn.functional.cross_entropy(theirs(tokens)[:, -1], targets))
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_values_that_somebody_writes_rest_where_the_row_says_once_settled() -> None:
    model = net(torch.float32)
    engine = XLAEngine(model, "fsdp")
    before = engine.report().at_rest
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.full(parameter.shape, 2.0))
    engine.settle()
    assert engine.report().at_rest == before
    assert all(bool((parameter == 2).all()) for parameter in model.parameters())


def test_a_batch_that_does_not_divide() -> None:
    engine = XLAEngine(nn.Linear(2, 2), "ddp")
    with pytest.raises(ValueError, match=r"multiple of the 4 XLA devices, got a tensor of shape \(6, 2\)"):
        engine.put_batch({"x": torch.ones(6, 2)})


def test_scalars_of_a_batch_are_whole_and_other_values_stay() -> None:
    engine = XLAEngine(nn.Linear(2, 2), "ddp")
    placed = engine.put_batch({"x": torch.ones(8, 2), "weight": torch.tensor(0.5), "name": "a"})
    assert placed["name"] == "a"
    assert float(placed["weight"]) == 0.5
    assert engine.placing.bytes_on_one(placed["x"]) == 4 * 2 * 2


def test_an_optimizer_of_other_parameters() -> None:
    model = nn.Linear(2, 2)
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = XLAEngine(model, "ddp")
    with pytest.raises(ValueError, match="group 0 of SGD has others.*make the optimizer after it"):
        engine.add_optimizer(early)


def test_a_fused_optimizer() -> None:
    model = nn.Linear(2, 2)
    engine = XLAEngine(model, "ddp")
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(ValueError, match="Expected AdamW without fused=True"):
        engine.add_optimizer(optimizer)


def test_a_mesh_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="Expected shard_size to divide the number of XLA devices, 4, got 3"):
        XLAEngine(nn.Linear(2, 2), "fsdp_hybrid", shard_size=3)
    with pytest.raises(ValueError, match="Expected shard_size for hybrid rows only"):
        XLAEngine(nn.Linear(2, 2), "fsdp", shard_size=2)


def test_a_unit_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        XLAEngine(net(torch.float32), "fsdp", units=["nowhere"])


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="got 'weight' on the meta device"):
        XLAEngine(model, "fsdp")


def test_the_report_reads_well() -> None:
    model = nn.Linear(8, 8, bias=False)
    text = str(XLAEngine(model, "fsdp").report())
    assert text.splitlines()[0] == (
        "accel_xla, row fsdp, 4 devices (4 divide a copy), after 0 optimizer steps, 0 programs compiled"
    )
    assert "    parameters                                  64" in text
