"""When something is wrong, a run ends soon, on every rank, with the message that names the cause."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.utilities import grad_norm
from models import ROWS, Net, Regression, alone, assert_close, loader, trainer, values
from processes import Finished, run_script
from torch import nn

from harness import Ranks
from opened import opened
from rows import everyday

LIMIT_S = 30.0
"""What the project promises: with a dead peer all ranks end within this time."""

# ---------------------------------------------------------------------- a rank that dies


def require_failed(*options: str) -> Finished:
    """Run the script, in which a rank is to fail: all of it ends soon after that, with an error."""
    finished = run_script("--strategy", *options)
    end = time.time()
    assert end - float(finished.stdout.rpartition("failing at ")[2].split()[0]) < LIMIT_S
    assert finished.code != 0
    assert finished.left == []
    return finished


def require_cause(finished: Finished, rank: int) -> str:
    """What follows the cause, which is there in full, before anything that follows from it."""
    assert "Traceback (most recent call last)" in finished.stderr
    cause = f"LookupError: no more luck on rank {rank}"
    assert cause in finished.stderr
    before, _, after = finished.stderr.partition(cause)
    assert "Another rank has ended" not in before
    return after


@pytest.mark.matrix
# accel_zero2 on rank 1 is below, with checkpoints.
@pytest.mark.parametrize(("strategy", "rank"), [("accel_zero2", 0), ("accel_ddp", 1)])
def test_exception_on_one_rank_ends_the_run(strategy: str, rank: int) -> None:
    require_cause(require_failed(strategy, "--fail", str(rank), "raises"), rank)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("strategy", "rank"), [("accel_zero2", 1), ("accel_fsdp", 0), ("accel_ddp", 0), ("accel_ddp", 1)]
)
def test_a_checkpoint_after_an_exception_on_one_rank(strategy: str, rank: int, tmp_path: Path) -> None:
    finished = require_failed(strategy, "--fail", str(rank), "raises", "--keep", str(tmp_path))
    # Saving fails as well, and says why; what was there before is what counts.
    assert "Expected all ranks to save a checkpoint" in require_cause(finished, rank)
    epoch, *more = sorted(tmp_path.iterdir())
    assert epoch.name == "step=4.ckpt"
    if strategy == "accel_ddp":  # rank 0 has everything: if it learns of the exception, it saves
        assert [path.name for path in more] in ([], ["step=6.ckpt"])
    else:
        assert more == []
    for path in (epoch, *more):
        saved = opened(path)
        assert saved["global_step"] == int(path.stem.removeprefix("step="))
        assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_run(rank: int) -> None:
    finished = require_failed("accel_zero2", "--fail", str(rank), "killed")
    # Who is killed says nothing; whoever is left says that it is not the cause. Lightning looks after the children of
    # rank 0 every five seconds, and may find the dead one and kill rank 0 before that has said so.
    assert "Another rank has ended" in finished.stderr or finished.code == -signal.SIGKILL


@pytest.mark.matrix
def test_torchrun(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
    finished = run_script("--strategy", "accel_zero1", "--save", str(tmp_path / "result.pt"), launcher=launcher)
    assert finished.code == 0, finished.stderr
    assert finished.left == []
    module = Regression()
    alone().fit(module, loader())
    assert_close(torch.load(tmp_path / "result.pt")["values"], values(module))


# ---------------------------------------------------------------------- ranks whose models differ


def change(net: nn.Module, difference: str) -> None:
    """Make a model that differs from the others'."""
    if difference == "shape":
        net.blocks[1].linear = nn.Linear(5, 6, dtype=torch.float64)
    elif difference == "name":
        net.blocks[1].dense = net.blocks[1].__dict__["_modules"].pop("linear")
    elif difference == "dtype":
        net.blocks[1].linear.float()
    elif difference == "order":
        first = net.__dict__["_modules"].pop("first")
        net.first = first
    elif difference == "frozen":
        net.blocks[1].linear.weight.requires_grad_(False)
    elif difference == "more":
        net.more = nn.Linear(1, 1)
    elif difference == "fewer":
        del net.last
    elif difference == "buffer":
        net.register_buffer("extra", torch.zeros(3))


DIFFERENCES = {
    "shape": ["'net.blocks.1.linear.weight'", "(5, 5)", "(6, 5)"],
    "name": ["'net.blocks.1.linear.weight'", "'net.blocks.1.dense.weight'"],
    "dtype": ["'net.blocks.1.linear.weight'", "float64", "float32"],
    "order": ["'net.first.weight'", "'net.blocks.0.linear.weight'"],
    "frozen": ["'net.blocks.1.linear.weight'", "trainable", "frozen"],
    "more": ["'net.more.weight'", "nothing more"],
    "fewer": ["'net.last.weight'", "nothing more"],
    "buffer": ["'net.extra'", "nothing more"],
}


def fit_different(difference: str, odd: int) -> None:
    module = Regression()
    if dist.get_rank() == odd:
        change(module.net, difference)
    trainer("accel_zero2", devices=dist.get_world_size()).fit(module, loader())


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_ranks_whose_models_differ(ranks2: Ranks, difference: str) -> None:
    for error in ranks2.run_expecting_error(fit_different, difference, 1):
        assert error is not None
        assert error[0] == "ValueError"
        for message in (*DIFFERENCES[difference], "rank 0 has", "rank 1 has"):
            assert message in error[1]


def test_the_rank_that_differs_is_named(ranks3: Ranks) -> None:
    for error in ranks3.run_expecting_error(fit_different, "shape", 2):
        assert error is not None
        assert "rank 2 has" in error[1]
        assert "rank 1 has" not in error[1]


def validate_different(difference: str) -> None:
    module = Regression()
    if dist.get_rank() == 1:
        change(module.net, difference)
    trainer("accel_ddp").validate(module, loader(), verbose=False)


def set_up_different(difference: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="accel_ddp")
    fabric.launch()
    net = Net()
    if dist.get_rank() == 1:
        change(net, difference)
    fabric.setup(net, torch.optim.SGD(net.parameters()))


@pytest.mark.parametrize("function", [validate_different, set_up_different])
def test_ranks_whose_models_differ_outside_of_fit(ranks2: Ranks, function: Any) -> None:
    for error in ranks2.run_expecting_error(function, "shape"):
        assert error is not None
        assert error[0] == "ValueError"
        assert "blocks.1.linear.weight" in error[1]


# ---------------------------------------------------------------------- a checkpoint that misfits


class Misfit(Regression):
    """Has a parameter too many, one too few, and two of other shapes than Regression."""

    def __init__(self) -> None:
        super().__init__()
        self.net.last = nn.Linear(5, 4, dtype=torch.float64)
        self.net.more = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        del self.net.blocks[2]


class TwoOptimizers(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = [self.net.blocks.parameters(), [*self.net.first.parameters(), *self.net.last.parameters()]]
        return [torch.optim.AdamW(part) for part in parts], []


class OtherGroups(Regression):
    """One optimizer, with the parameters in two groups."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([{"params": self.net.blocks.parameters()}, {"params": self.net.first.parameters()}])


class Wider(Regression):
    """Another shape, in layers that the checkpoint's weights are not loaded into."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.net.blocks[0].linear = nn.Linear(5, 5, dtype=torch.float64)
        self.net.first = nn.Linear(5, 5, dtype=torch.float64)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = checkpoint["optimizer_states"][0]["state"]
        for index in (0, 3):  # first.weight and blocks.0.linear.bias
            states[index] = {key: value.new_zeros(9) if value.dim() else value for key, value in states[index].items()}
        states[77] = states[1]


MODELS: dict[str, Any] = {"misfit": Misfit, "two": TwoOptimizers, "groups": OtherGroups, "shapes": Wider}


def fit_from(row: str, path: Path, model: str) -> None:
    trainer(f"accel_{row}", max_epochs=2).fit(MODELS[model](), loader(), ckpt_path=path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "stopped.ckpt"
    used = alone()
    used.fit(Regression(), loader())
    used.save_checkpoint(path)
    return path


@pytest.mark.parametrize("row", everyday(["ddp", "zero2"]))
def test_checkpoint_of_another_model_lists_all_that_misfits(ranks2: Ranks, checkpoint: Path, row: str) -> None:
    for error in ranks2.run_expecting_error(fit_from, row, checkpoint, "misfit"):
        assert error is not None
        missing = ["net.more"]
        unexpected = ["net.blocks.2.linear.weight", "net.blocks.2.linear.bias"]
        shapes = ["net.last.weight", "net.last.bias", "[3, 5]", "[4, 5]"]
        for message in ("Missing key(s)", "Unexpected key(s)", "size mismatch", *missing, *unexpected, *shapes):
            assert message in error[1].replace("torch.Size(", "")


@pytest.mark.parametrize("row", everyday(ROWS))
def test_checkpoint_with_another_number_of_optimizers(ranks2: Ranks, checkpoint: Path, row: str) -> None:
    for error in ranks2.run_expecting_error(fit_from, row, checkpoint, "two"):
        assert error is not None
        assert error[0] == "ValueError"
        assert "the state of 2 optimizers, got that of 1" in error[1]


@pytest.mark.parametrize("row", everyday(["zero1", "zero2", "ddp"]))
def test_optimizer_state_of_other_groups(ranks2: Ranks, checkpoint: Path, row: str) -> None:
    for error in ranks2.run_expecting_error(fit_from, row, checkpoint, "groups"):
        assert error is not None
        assert error[0] == "ValueError"
        assert "parameter groups: expected 2, got 1" in error[1]


@pytest.mark.parametrize("row", everyday(ROWS))
def test_optimizer_state_of_other_shapes_lists_all(ranks2: Ranks, checkpoint: Path, row: str) -> None:
    for error in ranks2.run_expecting_error(fit_from, row, checkpoint, "shapes"):
        assert error is not None
        assert error[0] == "ValueError"
        for name, shape in {"net.first.weight": (5, 5), "net.blocks.0.linear.bias": (5,)}.items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert f"{name}: {key!r} has shape (9,), expected {shape}" in error[1]
        assert "unexpected: state of parameter number 77" in error[1]


def fit_fabric_from(row: str, path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=f"accel_{row}")
    fabric.launch()
    net = Misfit().net
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    saved = opened(path)
    if dist.get_rank() == 0:
        torch.save({"model": saved["state_dict"], "optimizer": saved["optimizer_states"][0]}, path.with_suffix(".pt"))
    fabric.barrier()
    fabric.load(path.with_suffix(".pt"), {"optimizer": optimizer})


def test_fabric_optimizer_state_that_misfits(ranks2: Ranks, checkpoint: Path) -> None:
    for error in ranks2.run_expecting_error(fit_fabric_from, "zero2", checkpoint):
        assert error is not None
        assert error[0] == "ValueError"
        assert "expected 9 parameters, got 10" in error[1]


# ---------------------------------------------------------------------- optimizers and modules


class Stranger(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(Net().parameters(), lr=0.1)


class Shared(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters()), torch.optim.SGD(self.net.last.parameters())], []


class PlainBackward(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch).backward()


class OwnClipping(Regression):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class OwnNorms(Regression):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, 2))


WRONG: dict[str, tuple[Any, str, list[str]]] = {
    "stranger": (Stranger, "ValueError", ["SGD", "parameter 0 of group 0", "'net.first.weight' has that shape"]),
    "shared": (Shared, "ValueError", ["'net.last.weight' is in a SGD already"]),
    "backward": (PlainBackward, "RuntimeError", ["self.manual_backward(loss)"]),
    "norms": (OwnNorms, "RuntimeError", ["rests sharded", "engine.full_gradient(parameter)"]),
    "clipping": (OwnClipping, "RuntimeError", ["rests sharded", "gradient_clip_val"]),
}


def fit_wrong(kind: str) -> None:
    trainer("accel_zero2").fit(WRONG[kind][0](), loader())


@pytest.mark.parametrize("kind", WRONG)
def test_what_the_engine_cannot_follow_is_refused(ranks2: Ranks, kind: str) -> None:
    _, expected, messages = WRONG[kind]
    for error in ranks2.run_expecting_error(fit_wrong, kind):
        assert error is not None
        assert error[0] == expected
        for message in messages:
            assert message in error[1]
