"""`activation_checkpointing` and `compile` as arguments of the strategies."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from models import ROWS, Block, Net, Regression, alone, assert_close, loader, trainer, values
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from harness import Ranks
from lightning_accel.strategies import AccelDDPStrategy, AccelFSDPStrategy, AccelZeROStrategy, fabric
from rows import everyday

ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("AccelDDPStrategy", {}),
    "zero1": ("AccelZeROStrategy", {"stage": 1}),
    "zero2": ("AccelZeROStrategy", {"stage": 2}),
    "fsdp": ("AccelFSDPStrategy", {}),
    "fsdp_partial": ("AccelFSDPStrategy", {"sharding": "partial"}),
}


def save_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {"context_fn": functools.partial(create_selective_checkpoint_contexts, save_products)}
WAYS: dict[str, dict[str, Any]] = {
    "all blocks": {"activation_checkpointing": True},
    "by class": {"activation_checkpointing": {Block}, "activation_checkpointing_options": SELECTIVE},
    "by name, reentrant": {
        "activation_checkpointing": ["net.blocks.0", "net.blocks.2"],
        "activation_checkpointing_options": {"use_reentrant": True, "preserve_rng_state": False},
    },
    "compiled": {"activation_checkpointing": True, "compile": {"backend": "aot_eager"}},
}


class Noting(Regression):
    """Notes what its blocks run: whether gradients were on, and whether the block was recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[int] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._hooks = [
            block.linear.register_forward_hook(lambda *_: self.forwards.append(batch_idx)) for block in self.net.blocks
        ]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for hook in self._hooks:
            hook.remove()


def fit(row: str | None, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[int], list[str], bool]:
    torch._dynamo.reset()
    module = Regression() if "compile" in settings else Noting()
    if row is None:
        used = alone()
    else:
        name, arguments = ARGUMENTS[row]
        classes = {kind.__name__: kind for kind in (AccelDDPStrategy, AccelZeROStrategy, AccelFSDPStrategy)}
        used = trainer(classes[name](**arguments, **settings))
    used.fit(module, loader(), loader(size=16))
    clean = all("forward" not in vars(m) and m._compiled_call_impl is None for m in module.modules())
    return values(module), getattr(module, "forwards", []), list(module.state_dict()), clean


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", everyday(ROWS))
def test_trainer(ranks2: Ranks, row: str, way: str) -> None:
    expected, forwards, names, _ = fit(None, {})
    blocks = 2 if "name" in way else 3
    for result, recomputed, names_now, clean in ranks2.run(fit, row, WAYS[way]):
        assert_close(result, expected)
        if way != "compiled":  # nothing can be noted there
            assert len(recomputed) == len(forwards) * (3 + blocks) // 3
        assert names_now == names
        assert clean  # the strategy has gone and left nothing behind


def loop(row: str | None, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    torch._dynamo.reset()
    net = Net()
    if row is None:
        used = Fabric(accelerator="cpu", devices=1)
    else:
        name, arguments = ARGUMENTS[row]
        used = Fabric(accelerator="cpu", devices=2, strategy=getattr(fabric, name)(**arguments, **settings))
    used.launch()
    model, optimizer = used.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    for _, x, y in loader():
        used.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    names = [name for name, _ in net.named_parameters()]
    found = values(net)
    if row is not None:
        used.strategy.teardown()
    return found, names


@pytest.mark.parametrize("way", ["all blocks", "compiled"])
@pytest.mark.parametrize("row", everyday(ROWS))
def test_fabric(ranks2: Ranks, row: str, way: str) -> None:
    expected, names = loop(None, {})
    for result, names_now in ranks2.run(loop, row, WAYS[way]):
        assert_close(result, expected)
        assert names_now == names


# -------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_checkpointing": "net"}, "Expected activation_checkpointing to be .* list .* got 'net'"),
        ({"activation_checkpointing": Block}, "Expected activation_checkpointing to be .* list .* got <class"),
        ({"activation_checkpointing": []}, r"Expected activation_checkpointing to be .* got \[\]"),
        (
            {"activation_checkpointing_options": {"debug": True}},
            "Expected activation_checkpointing to be set where it has options",
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_options": {"reentrant": True}},
            "Expected options of torch.utils.checkpoint .*got 'reentrant'",
        ),
        (
            {"activation_checkpointing": True, "compile": {"backend": "eager"}},
            "Expected another backend than 'eager'",
        ),
    ],
    ids=["string", "class", "empty", "unused", "unknown", "backend"],
)
@pytest.mark.parametrize("strategy", [AccelFSDPStrategy, fabric.AccelDDPStrategy], ids=["trainer", "fabric"])
def test_settings_that_make_no_sense(strategy: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**settings)


def test_lightnings_name_for_it() -> None:
    with pytest.raises(TypeError, match="'activation_checkpointing_policy' is 'activation_checkpointing' here"):
        AccelFSDPStrategy(activation_checkpointing_policy={Block})


class Flat(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).double()


def fit_wrong(model: Any, which: Any) -> None:
    trainer(AccelFSDPStrategy(activation_checkpointing=which)).fit(model(), loader())


@pytest.mark.parametrize(
    ("model", "which", "message"),
    [
        (Regression, [nn.Conv2d], "Expected `activation_checkpointing` to name modules.*Conv2d.* matches nothing"),
        (Regression, ["net.blcoks"], "'net.blcoks' matches nothing.*Block"),
        (Flat, True, "Expected the model to have repeated blocks .*activation_checkpointing=True, found none"),
    ],
    ids=["class", "name", "no blocks"],
)
def test_what_matches_nothing(ranks2: Ranks, model: Any, which: Any, message: str) -> None:
    for error in ranks2.run_expecting_error(fit_wrong, model, which):
        assert error is not None
        kind, text = error
        assert kind == "ValueError"
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)
