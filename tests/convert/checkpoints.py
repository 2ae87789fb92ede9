"""Small checkpoints, and what it takes for two of them to be the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.core.checkpoint import StoredTensor


class Net(nn.Module):
    """Parameters of odd sizes, tied ones, frozen ones, buffers of several dtypes; two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.first = nn.Linear(5, 9)
        self.norm = nn.LayerNorm(9)
        self.second = nn.Linear(9, 5, bias=False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.second(self.norm(self.first(self.embedding(tokens))))))

    def groups(self) -> list[dict[str, Any]]:
        """In another order than that of ``parameters()``."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
            {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        ]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, 7, (2, 4), generator=generator)
    return tokens, targets


def step(module: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    """One step on the batches of some seeds."""
    optimizer.zero_grad()
    for seed in seeds:
        tokens, targets = batch(seed)
        (nn.functional.cross_entropy(module(tokens), targets) / len(seeds)).backward()
    optimizer.step()


def trained() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.groups(), lr=1e-2)
    for seed in range(3):
        step(net, optimizer, seed)
    return net, optimizer


def trainer_checkpoint() -> dict[str, Any]:
    """As the Trainer makes it."""
    net, optimizer = trained()
    return {
        "epoch": 1,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 1, "_last_lr": [0.01, 0.01]}],
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_k_models": {}}},
        "hyper_parameters": {"lr": 0.01, "betas": (0.9, 0.999), "name": "ünïcode"},
    }


def plain(value: Any) -> Any:
    """With ordinary tensors and dictionaries."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value)
    return value.full() if isinstance(value, StoredTensor) else value


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Equal keys, types and, bit by bit, tensors."""
    actual = actual.full() if isinstance(actual, StoredTensor) else actual
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        mine, its = (entry.detach().contiguous().reshape(-1).view(torch.uint8) for entry in (actual, expected))
        assert torch.equal(mine, its), where
    elif isinstance(expected, dict):
        assert list(map(str, sorted(actual, key=str))) == list(map(str, sorted(expected, key=str))), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert type(actual) is type(expected), where
        assert len(actual) == len(expected), where
        for index, (mine, its) in enumerate(zip(actual, expected, strict=True)):
            assert_same(mine, its, f"{where}.{index}")
    else:
        assert type(actual) is type(expected), where
        assert actual == expected, where


def tied(model: dict[str, Any], one: str, other: str) -> bool:
    """Whether two tensors of a state_dict share their memory."""
    if isinstance(model[one], StoredTensor):
        return model[one] is model[other]
    return model[one].data_ptr() == model[other].data_ptr()
