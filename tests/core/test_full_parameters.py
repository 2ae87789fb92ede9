"""The model is used within `full_parameters`: values stay there, and changes are kept."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist

from core.toys import Net, adamw, build, data, mse, my_share, relative_error, train, train_alone, values
from lightning_accel.core import Engine
from rows import everyday

SHARDED = ["fsdp", "fsdp_partial"]


def evaluate_within(row: str, grad: bool) -> tuple[float, float, float]:
    module, alone = build(Net), build(Net)
    engine = Engine(module, row)
    engine.add_optimizer(adamw(module.parameters()))
    x, y = data(1, 1)
    with engine.full_parameters(writeback=True):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
            for parameter in alone.parameters():
                parameter.mul_(1.5)
        with torch.set_grad_enabled(grad):
            output = mse(module, x[0], y[0]).detach()
        within = relative_error(module.parameters(), alone.parameters())
    with engine.full_parameters():
        after = relative_error(module.parameters(), alone.parameters())
    engine.close()
    return within, after, float((output - mse(alone, x[0], y[0])).abs())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("row", SHARDED)
def test_a_forward_within_full_parameters_frees_nothing(ranks2, row, grad):
    for found in ranks2.run(evaluate_within, row, grad):
        assert found == (0, 0, 0)


def train_around(row: str) -> float:
    module, alone = build(Net), build(Net)
    engine, theirs = Engine(module, row), adamw(alone.parameters())
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    x, y = data(1, 1)
    for _ in range(3):
        train(engine, optimizer, 1)
        train_alone(alone, theirs, 1, dist.get_world_size())
        with engine.full_parameters(), torch.no_grad():
            mse(module, x[0], y[0])
        with pytest.raises(RuntimeError, match="rest sharded"):  # freed after all
            module.last.weight.sum()
    engine.close()
    return relative_error(module.parameters(), alone.parameters())


@pytest.mark.parametrize("row", SHARDED)
def test_training_goes_on_afterwards(ranks2, row):
    assert max(ranks2.run(train_around, row)) < 1e-12


def train_with_copies(row: str) -> float:
    module, alone = build(Net), build(Net)
    engine, theirs = Engine(module, row), adamw(alone.parameters())
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    x, y = data(1, 1)
    for _ in range(3):
        train(engine, optimizer, 1)
        train_alone(alone, theirs, 1, dist.get_world_size())
        with engine.full_parameters():
            copied = copy.deepcopy(module)
        mse(copied, x[0], y[0]).backward()
        alone.zero_grad()
        mse(alone, x[0], y[0]).backward()
        gradients = [[p.grad for p in net.parameters()] for net in (copied, alone)]
        assert relative_error(*gradients) < 1e-12, "the copy is a plain module"
    engine.close()
    mse(copied, x[0], y[0])
    assert relative_error(copied.parameters(), alone.parameters()) < 1e-12, "and stays what it is"
    return relative_error(module.parameters(), alone.parameters())


@pytest.mark.parametrize("row", ["zero2", *SHARDED])
def test_a_deep_copy_is_a_plain_module(ranks2, row):
    assert max(ranks2.run(train_with_copies, row)) < 1e-12


def pickle_within(row: str) -> bytes:
    module, alone = build(Net), build(Net)
    engine, theirs = Engine(module, row), adamw(alone.parameters())
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 1)
    train_alone(alone, theirs, 1, dist.get_world_size())
    if row in SHARDED:
        for part in (module, module.blocks[0], optimizer):
            with pytest.raises(RuntimeError, match=r"got pickling .* `with engine\.full_parameters\(\):`"):
                pickle.dumps(part)
    with engine.full_parameters():
        with pytest.raises(TypeError, match=r"the module that you made, or better its state_dict\(\)"):
            pickle.dumps({"engine": engine})
        pickles = [pickle.dumps(module), pickle.dumps(copy.deepcopy(module))]
        file = io.BytesIO()
        torch.save(module, file)
    train(engine, optimizer, 1)
    engine.close()
    file.seek(0)
    x, _ = data(1, 1)
    expected = alone(x[0])
    for restored in (*map(pickle.loads, pickles), torch.load(file, weights_only=False)):
        assert relative_error(restored.parameters(), alone.parameters()) < 1e-12
        assert relative_error([restored(x[0])], [expected]) < 1e-12
    return pickles[0]


@pytest.mark.parametrize("row", ["zero2", *SHARDED])
def test_a_pickle_is_a_plain_module(ranks2, row):
    for made in ranks2.run(pickle_within, row):
        assert b"lightning_accel" not in made, "it loads where this package is not installed"


def let_go(row: str) -> bool:
    engine = Engine(build(Net), row)
    engine.add_optimizer(adamw(engine.module.parameters()))
    with engine.full_parameters():
        copied = copy.deepcopy(engine.module)
    engine.close()
    reference = weakref.ref(engine)
    del engine
    gc.collect()
    return reference() is None and copied is not None


@pytest.mark.parametrize("row", SHARDED)
def test_a_deep_copy_keeps_no_engine_alive(ranks2, row):
    assert ranks2.run(let_go, row) == [True, True]


def change(module: torch.nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


def step_within(row: str, writeback: bool, **options: object) -> list[float]:
    """Errors of the values within, after a step there and a change on either side of it, and after some training."""
    module, alone = build(Net), build(Net)
    engine, theirs = Engine(module, row, **options), adamw(alone.parameters())
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    ranks = dist.get_world_size()
    x, y = data(1, ranks)
    errors = []
    for _ in range(2):
        train(engine, optimizer, 1)
        train_alone(alone, theirs, 1, ranks)
        with engine.full_parameters(writeback=writeback):
            if writeback:
                change(module, 1.25)
                change(alone, 1.25)
            optimizer.zero_grad()
            engine.backward(mse(module, my_share(x[0]), my_share(y[0])))
            theirs.zero_grad()
            mse(alone, x[0], y[0]).backward()
            before = [parameter.detach().clone() for parameter in alone.parameters()]
            for which in (optimizer, theirs):
                which.step()
            errors.append(relative_error(module.parameters(), alone.parameters()))
            assert relative_error(module.parameters(), before) > 1e-4, "the step must be seen"
            if writeback:
                change(module, 0.75)
                change(alone, 0.75)
        errors.append(relative_error(values(engine), alone.parameters()))
    train(engine, optimizer, 1)
    train_alone(alone, theirs, 1, ranks)
    errors.append(relative_error(values(engine), alone.parameters()))
    engine.close()
    return errors


@pytest.mark.parametrize("writeback", [False, True])
@pytest.mark.parametrize("row", everyday(["ddp", "zero2", *SHARDED]))
def test_an_optimizer_step_within_full_parameters(ranks2, row, writeback):
    for errors in ranks2.run(step_within, row, writeback):
        assert max(errors) < 1e-12, errors


@pytest.mark.matrix
@pytest.mark.parametrize("writeback", [False, True])
def test_an_optimizer_step_within_full_parameters_of_a_hybrid(ranks_of, writeback):
    for errors in ranks_of(4).run(step_within, "fsdp_hybrid", writeback, shard_size=2):
        assert max(errors) < 1e-12, errors


class Refusing(torch.optim.SGD):
    def step(self, closure=None):
        raise LookupError("no step today")


def change_and_step(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    with engine.full_parameters(writeback=True):
        change(engine.module, 1.25)
        optimizer.step()


def fail_within(row: str) -> float:
    module = build(Net)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    engine = Engine(module, row)
    optimizer = Refusing(module.parameters(), lr=0.1)
    engine.add_optimizer(optimizer)
    x, y = data(1, 1)
    engine.backward(mse(module, x[0], y[0]))
    with pytest.raises(LookupError, match="no step today"):
        change_and_step(engine, optimizer)
    error = relative_error(values(engine), [1.25 * value for value in start])
    engine.close()
    return error


@pytest.mark.parametrize("row", SHARDED)
def test_a_step_that_fails_there_says_why_and_loses_nothing(ranks2, row):
    assert ranks2.run(fail_within, row) == [0, 0]
