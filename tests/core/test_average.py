"""Averages in parts: values, memory, bytes on the wire, and state in and out."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

from core.toys import ROW_NAMES, Net, adamw, build, data, mse, my_share, relative_error, train, values
from lightning_accel.core import Engine, Rest
from lightning_accel.core.average import Average
from rows import everyday

EXACT = 1e-12
STEPS = 8
FUNCTIONS = {
    "mean": {},
    "avg_fn": {"avg_fn": get_ema_avg_fn(0.7)},
    "multi_avg_fn": {"multi_avg_fn": get_ema_multi_avg_fn(0.7)},
    "mean avg_fn": {"avg_fn": get_swa_avg_fn()},
}


class Buffered(Net):
    """With a buffer of each kind, and a parameter that another module shares."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)  # counts batches in an integer
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.tied = self.blocks[0].linear

    def forward(self, x):
        self.scale.mul_(1.01)
        return super().forward(x) * self.scale + self.norm.weight


def step_all(engine, optimizer, steps, average=None, first=0):
    """Each rank on the global batch, so that buffers are those of a single process, too."""
    xs, ys = data(STEPS, dist.get_world_size())
    for i in range(first, first + steps):
        optimizer.zero_grad()
        with engine.forward_context():
            loss = mse(engine.module, xs[i], ys[i])
        engine.backward(loss)
        optimizer.step()
        if average is not None and i != 2:
            average.update()


def started(row, make=Buffered, optimizer=adamw, **options):
    module = build(make)
    engine = Engine(module, row, **{"bucket_cap_mb": 0.001, **options})
    made = optimizer([p for p in module.parameters() if p.requires_grad])
    engine.add_optimizer(made)
    return engine, made


def reference(function, use_buffers):
    module = build(Buffered)
    optimizer = adamw(module.parameters())
    average = AveragedModel(module, use_buffers=use_buffers, **FUNCTIONS[function])
    xs, ys = data(STEPS, dist.get_world_size())
    for i in range(STEPS):
        optimizer.zero_grad()
        mse(module, xs[i], ys[i]).backward()
        optimizer.step()
        if i != 2:
            if use_buffers and function.startswith("mean"):  # torch cannot subtract booleans
                for model in (module, average.module):
                    model.mask = model.mask.to(torch.uint8)
            average.update_parameters(module)
    return module, average.module


def average_beside_torch(row, function, buffers, device, **options):
    alone, expected = reference(function, buffers == "average")
    engine, optimizer = started(row, **options)
    average = Average(engine, buffers=buffers, device=device, **FUNCTIONS[function])
    step_all(engine, optimizer, STEPS, average)
    errors = {}

    def note(key, parameters_of, buffers_of):
        errors[key] = relative_error(values(engine), parameters_of.parameters())
        found, wanted = dict(engine.module.named_buffers()), dict(buffers_of.named_buffers())
        assert found["mask"].dtype is torch.bool
        errors[f"{key} buffers"] = relative_error(
            [found[name].double() for name in wanted], [value.double() for value in wanted.values()]
        )

    note("current", alone, alone)
    average.swap()
    note("averaged", expected, expected)
    average.swap()
    note("current again", alone, alone)
    state = average.state_dict()
    if row == "ddp" or dist.get_rank() == 0:
        wanted = dict([*expected.named_parameters(), *expected.named_buffers()])
        assert wanted.keys() <= state.keys()
        assert state["tied.weight"] is state["blocks.0.linear.weight"]
        errors["state"] = relative_error([state[n].double() for n in wanted], [v.double() for v in wanted.values()])
    else:
        assert state == {}
    average.transfer()
    note("transferred", expected, expected)
    engine.close()
    return errors


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_average_is_that_of_torch(ranks2, row, function):
    for errors in ranks2.run(average_beside_torch, row, function, "average", "cpu" if function == "avg_fn" else None):
        assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_buffers_of_the_last_update(ranks3, row):
    for errors in ranks3.run(average_beside_torch, row, "multi_avg_fn", "copy", None):
        assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("world", [4], indirect=True)
def test_copies_of_divided_state(world):
    for errors in world.run(average_beside_torch, "fsdp_hybrid", "mean", "average", None, shard_size=2):
        assert max(errors.values()) < EXACT, errors


def one_rank(row):
    return average_beside_torch(row, "mean", "average", None)


@pytest.mark.parametrize("world", [1], indirect=True)
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_one_rank(world, row):
    [errors] = world.run(one_rank, row)
    assert max(errors.values()) < EXACT, errors


def memory_and_traffic(row, whole):
    optimizer_of = (lambda p: torch.optim.Adafactor(p, lr=0.01)) if whole else adamw
    engine, optimizer = started(row, Net, optimizer_of)
    average = Average(engine)
    step_all(engine, optimizer, 3)
    engine.wait()
    engine.collectives.traffic.take()
    average.update()
    average.update()
    operations, sent = engine.collectives.traffic.take()
    engine.wait()
    average.swap()
    engine.wait()
    _, swapped = engine.collectives.traffic.take()
    parameters = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    padding = sum(unit.layout.padding * unit.flat.element_size() for unit in engine.units)
    return average.nbytes, parameters, padding, operations, sent, sum(swapped.values()), engine.row


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_memory_is_that_of_a_part_and_an_update_sends_nothing(ranks3, row):
    results = ranks3.run(memory_and_traffic, row, False)
    for size, parameters, padding, operations, sent, swapped, placement in results:
        ranks = 3 if placement.optimizer_state is Rest.SHARDED else 1
        assert size * ranks == parameters + padding
        assert operations == sent == {}
        # As after an optimizer step: whole parameters that others have are gathered.
        gathers = placement.optimizer_state is Rest.SHARDED and placement.parameters is Rest.REPLICATED
        assert swapped == gathers * (parameters + padding) // 3 * 2


@pytest.mark.parametrize("row", ["zero2", "fsdp"])
def test_parts_of_different_size(ranks2, row):
    results = ranks2.run(memory_and_traffic, row, True)
    assert sum(size for size, *_ in results) == results[0][1]
    assert all(result[3] == result[4] == {} for result in results)


def equal_units(one, other):
    """How many units have the same average, of how many."""
    return sum(torch.equal(flat, other._flats[unit]) for unit, flat in one._flats.items()), len(one._flats)


def saved_and_loaded(row, spread):
    engine, optimizer = started(row)
    average = Average(engine)
    step_all(engine, optimizer, 4, average)
    state = average.state_dict()
    if not spread:
        state = engine.collectives.gather_objects(state)[0]
    elif dist.get_rank() > 0:
        state = {}
    other = Average(engine)
    before, _ = equal_units(average, other)
    other.load_state_dict(state, average.count)
    buffers = [torch.equal(one, other._buffer_averages[name]) for name, one in average._buffer_averages.items()]
    return before, equal_units(average, other), all(buffers) and other.count == average.count == 3


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_state_from_one_rank_or_all(ranks2, row, spread):
    for before, (equal, units), others in ranks2.run(saved_and_loaded, row, spread):
        assert before == 0
        assert equal == units
        assert others


def load_what_does_not_fit(row, change):
    engine, _ = started(row, Net)
    average = Average(engine)
    state = engine.collectives.gather_objects(average.state_dict())[0]
    if change == "missing":
        del state["first.bias"]
    elif change == "shape":
        state["last.weight"] = state["last.weight"].T
    else:
        state = {}
    average.load_state_dict(state if change == "missing" or dist.get_rank() == 0 else {}, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing: first\.bias"),
        ("shape", r"last\.weight has shape \(13, 3\), expected \(3, 13\)"),
        ("empty", "empty on every rank"),
    ],
)
def test_state_that_does_not_fit_is_refused_on_all_ranks(ranks2, change, message):
    for kind, text in ranks2.run_expecting_error(load_what_does_not_fit, "zero2", change):
        assert kind == "ValueError"
        assert re.search(message, text)


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)
        self.blocks[1].requires_grad_(False)


def thawed(row, drop):
    """Freeze, train, thaw, train; beside torch."""
    alone = build(Frozen)
    theirs = adamw([p for p in alone.parameters() if p.requires_grad])
    expected = AveragedModel(alone, avg_fn=get_ema_avg_fn(0.7))
    engine, optimizer = started(row, Frozen)
    average = Average(engine, avg_fn=get_ema_avg_fn(0.7))
    size = average.nbytes
    xs, ys = data(STEPS, dist.get_world_size())
    for i in range(STEPS):
        if i == 4:
            for module, made in ((alone, theirs), (engine.module, optimizer)):
                module.blocks[1].requires_grad_(True)
                module.first.requires_grad_(True)
                if not drop:
                    made.add_param_group({"params": list(module.blocks[1].parameters())})
        if i == 6 and not drop:
            theirs.add_param_group({"params": list(alone.first.parameters())})
            optimizer.add_param_group({"params": list(engine.module.first.parameters())})
        theirs.zero_grad()
        mse(alone, xs[i], ys[i]).backward()
        theirs.step()
        expected.update_parameters(alone)
        optimizer.zero_grad()
        with engine.forward_context():
            loss = mse(engine.module, my_share(xs[i]), my_share(ys[i]))
        engine.backward(loss)
        optimizer.step()
        average.update()
    average.swap()
    error = relative_error(values(engine), expected.module.parameters())
    return error, size, average.nbytes


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_units_that_are_laid_out_anew_keep_their_average(ranks2, row):
    for error, before, after in ranks2.run(thawed, row, False):
        assert error < EXACT
        assert before < after, "frozen parameters have no average"


def frozen_after_training(row):
    """A state in which a parameter that is frozen now differs from its average."""
    engine, _ = started(row, Frozen)
    average = Average(engine)
    size = average.nbytes
    state = {name: p.detach() + 1 for name, p in build(Frozen).named_parameters()}
    average.load_state_dict(state if dist.get_rank() == 0 else {}, 3)
    found = engine.collectives.gather_objects(average.state_dict())[0]
    error = relative_error([found[name] for name in state], state.values())
    average.update()
    engine.module.first.requires_grad_(True)
    engine.mark_stale()
    engine.build()
    found = engine.collectives.gather_objects(average.state_dict())[0]
    expected = [value - 0.25 for value in state.values()]
    return error, relative_error([found[name] for name in state], expected), size, average.nbytes


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_frozen_parameters_that_differ_from_their_average(ranks2, row):
    for loaded, updated, before, after in ranks2.run(frozen_after_training, row):
        assert loaded < EXACT
        assert updated < EXACT
        assert before < after


def two_optimizers(row):
    """One elementwise, one that needs whole tensors, which steps every other time."""
    expected, results = None, []
    for engine in (None, Engine(build(Net), row)):
        module = build(Net) if engine is None else engine.module
        first, *rest = [list(part.parameters()) for part in (module.first, module.blocks, module.last)]
        optimizers = [adamw(first), torch.optim.Adafactor([p for part in rest for p in part], lr=0.01)]
        if engine is None:
            average = expected = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.7))
        else:
            for optimizer in optimizers:
                engine.add_optimizer(optimizer)
            average = Average(engine, multi_avg_fn=get_ema_multi_avg_fn(0.7))
        xs, ys = data(STEPS, dist.get_world_size())
        for i in range(STEPS):
            if engine is None:
                mse(module, xs[i], ys[i]).backward()
            else:
                with engine.forward_context():
                    loss = mse(module, my_share(xs[i]), my_share(ys[i]))
                engine.backward(loss)
            for optimizer in optimizers[: 1 + i % 2]:
                optimizer.step()
                optimizer.zero_grad()
            average.update_parameters(module) if engine is None else average.update()
        if engine is not None:
            average.transfer()
            results = values(engine)
    return relative_error(results, expected.module.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_several_optimizers(ranks3, row):
    assert max(ranks3.run(two_optimizers, row)) < EXACT


def use(row, what):
    engine, optimizer = started(row, Net)
    if what == "both":
        Average(engine, avg_fn=get_swa_avg_fn(), multi_avg_fn=get_ema_multi_avg_fn())
    average = Average(engine)
    if what == "swapped":
        average.swap()
        average.update()
    if what == "buffer":
        engine.module.register_buffer("late", torch.zeros(2))
        average.update()
    if what == "backward":
        engine.module.first.weight.register_post_accumulate_grad_hook(lambda _: average.swap())
        train(engine, optimizer, 1)
    engine.close()
    average.update()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("both", "one of avg_fn and multi_avg_fn, got both"),
        ("swapped", "it has the averaged ones"),
        ("buffer", "'late' has shape"),
        ("backward", "got a change within backward"),
        ("closed", "got that of one that was closed"),
    ],
)
def test_wrong_use_is_an_error_that_says_so(ranks2, what, message):
    for found in ranks2.run_expecting_error(use, "zero1", what):
        assert found is not None
        assert message in found[1]
