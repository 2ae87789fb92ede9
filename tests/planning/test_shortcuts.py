"""What is made directly is what torch makes of fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_accel.planning import Plan, plan
from lightning_accel.planning.shortcuts import Shortcuts
from planning.gpt import Gpt


class Shortcutting(TorchDispatchMode):
    """Carries operations out by shortcuts, and counts those that get as far as torch's own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcuts = Shortcuts()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.shortcuts.run(func, args, kwargs or {})


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "new memory": lambda x: x + 1,
    "another dtype": lambda x: x.to(torch.bfloat16),
    "of a list": lambda x: torch.cat([x, x], 1),
    "its inputs swapped": lambda x: torch.sub(x[0], x),
    "in place": lambda x: x.add_(1),
    "into another": lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
    "a view": lambda x: x[1:, 2:],
    "a view of a view": lambda x: x[1:].t()[1:],
    "another shape": lambda x: x.view(2, -1),
    "detached": lambda x: x.detach(),
    "a copy": lambda x: x.t().contiguous(),
    "several": lambda x: x.sum() * x.std(0),
    "a mask": lambda x: x > 0,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_the_second_time_is_as_the_first(operation: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode(), Shortcutting():
        x = torch.empty(4, 6)
        first, second = operation(x), operation(x)
    for made in (first, second):
        assert isinstance(made, FakeTensor)
    assert (second.shape, second.stride(), second.dtype) == (first.shape, first.stride(), first.dtype)
    assert (second.device, second.storage_offset()) == (first.device, first.storage_offset())
    assert (second is x) == (first is x)

    def shares(made: Tensor) -> bool:
        return made.untyped_storage()._cdata == x.untyped_storage()._cdata

    assert shares(second) == shares(first)
    assert second.untyped_storage().nbytes() == first.untyped_storage().nbytes()


def test_equal_numbers_of_different_types_are_told_apart() -> None:
    with FakeTensorMode(), Shortcutting():
        x = torch.empty(3, dtype=torch.long)
        found = [(x * factor).dtype for factor in (2, 2.0, True, 2, 2.0)]
    assert found == [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32]


class Net(nn.Module):
    """Buffers, randomness, several outputs, indices, a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten())
        self.lstm = nn.LSTM(288, 6)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.body(x))
        first, second = hidden.chunk(2, -1)
        joined = torch.cat([first.exp(), second.unbind(-1)[0].unsqueeze(-1) * self.scale], -1)
        return joined.topk(2).values.index_select(0, torch.arange(2)).var(0).mean()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (lambda: Gpt(64, 2, 4, 100, 16), torch.empty(2, 16, dtype=torch.long, device="meta")),
        (Net, torch.empty(4, 3, 8, 8, device="meta")),
    ],
    ids=["gpt", "net"],
)
def test_plans_are_the_same_without(
    model: Callable[[], nn.Module], batch: Tensor, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned() -> Plan:
        optimizer = torch.optim.AdamW
        return plan(model, batch=batch, optimizer=optimizer, precision=precision, ranks=4, rows=["zero2", "fsdp"])

    shortened = planned()
    monkeypatch.setattr(Shortcuts, "run", lambda _, func, args, kwargs: func(*args, **kwargs))
    whole = planned()
    assert shortened.to_dict() == whole.to_dict()
    if precision == "32-true":  # autocast lets go of what it has rounded in an order that differs from run to run
        assert [row.course for row in shortened.rows] == [row.course for row in whole.rows]


def test_what_is_written_into_gets_its_size_each_time() -> None:
    with FakeTensorMode(), Shortcutting():
        x = torch.empty(4)
        for _ in range(2):
            out = torch.empty(0)
            torch.add(x, 1, out=out)
            assert out.shape == (4,)
