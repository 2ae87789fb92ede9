"""The engine's numbers are those of a single process, and its mistakes have clear errors."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core.toys import (
    EXACT,
    ROW_NAMES,
    Net,
    adamw,
    build,
    compare,
    data,
    mse,
    my_share,
    prepared,
    relative_error,
    sgd,
    started,
    train,
    train_alone,
    values,
)
from lightning_accel.core import Engine
from lightning_accel.core.torch_collectives import TorchCollectives
from rows import everyday


def alone_is_right():
    module = build(Net)
    train_alone(module, adamw(module.parameters()), 2, 1)
    return relative_error(module.parameters(), build(Net).parameters())


def test_the_reference_itself_trains():
    assert alone_is_right() > 1e-3


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_equals_the_single_process(world, row, accumulate):
    assert max(world.run(compare, Net, row, accumulate=accumulate, bucket_cap_mb=0.001)) < EXACT


@pytest.mark.parametrize("cap", [0.0005, 25])
def test_one_unit_or_many_make_no_difference(ranks2, cap):
    assert max(ranks2.run(compare, Net, "zero2", bucket_cap_mb=cap)) < EXACT


def on_generic_collectives(row):
    def connect(device, group=None):
        return TorchCollectives(device, group, group)

    with mock.patch("lightning_accel.core.agreement.connect", connect):
        engine, optimizer = prepared(row, bucket_cap_mb=0.001)
    assert type(engine.mesh.shard) is TorchCollectives
    train(engine, optimizer, 3)
    alone = build(Net)
    reference = adamw(alone.parameters())
    xs, ys = data(3, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        reference.zero_grad()
        mse(alone, x, y).backward()
        reference.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_the_generic_collectives_do_with_units_of_different_sizes(ranks2, row):
    assert max(ranks2.run(on_generic_collectives, row)) < EXACT


# ---------------------------------------------------------------------- parameters, layers and buffers


class Odd(nn.Module):
    """Scalars, empty, non-contiguous, channels-last, tied, frozen, complex and twice-used parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = nn.Parameter(torch.randn(8, 8).t() / 3)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.offset = nn.Parameter(torch.tensor(-0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.conv = nn.Conv2d(2, 2, (1, 3), padding=(0, 1)).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = self.tied(torch.tanh(self.second(x))) + self.second(x) * self.scale + self.offset
        x = self.conv(x.view(-1, 2, 1, 4)).reshape(-1, 8)
        x = x + self.frozen(x) + torch.cat([self.phase.real, self.phase.imag]) + self.empty.sum()
        return self.last(x)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_odd_parameters(world, row):
    assert max(world.run(compare, Odd, row, sgd, bucket_cap_mb=0.0005)) < EXACT


class MixedTypes(Net):
    def __init__(self):
        super().__init__()
        self.gain = nn.ParameterList([torch.ones(13, dtype=torch.bfloat16)])

    def forward(self, x):
        x = torch.tanh(self.first(x)) * self.gain[0].to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def two_dtypes(row):
    module = MixedTypes()
    for part in (module.first, module.blocks, module.last):
        part.double()
    engine = Engine(module, row)
    optimizer = sgd(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 3)
    dtypes = {unit.flat.dtype for unit in engine.units}
    with engine.full_parameters():
        gain = module.gain[0].detach().clone()
    moved = not torch.equal(gain, torch.ones_like(gain))
    everyone = engine.collectives.gather_objects(gain.tolist())
    return dtypes, moved, all(values == everyone[0] for values in everyone)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_parameters_of_two_dtypes(ranks2, row):
    for dtypes, moved, same in ranks2.run(two_dtypes, row):
        assert dtypes == {torch.float64, torch.bfloat16}
        assert moved
        assert same


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(7, 5, num_layers=2), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.lstm(x)[0])


def recurrent(row):
    engine, optimizer = prepared(row, Recurrent, sgd)
    alone = build(Recurrent)
    reference = sgd(alone.parameters())
    xs, ys = data(4, dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        reference.zero_grad()
        optimizer.zero_grad()
        # One sample at a time: the recurrent layer takes the batch for a sequence.
        (sum(mse(alone, a, b) for a, b in zip(x.split(1), y.split(1), strict=True)) / len(x)).backward()
        mine = zip(my_share(x).split(1), my_share(y).split(1), strict=True)
        engine.backward(sum(mse(engine.module, a, b) for a, b in mine) / len(my_share(x)))
        reference.step()
        optimizer.step()
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_recurrent_layers(ranks2, row):
    assert max(ranks2.run(recurrent, row)) < EXACT


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)
        self.register_buffer("constant", torch.ones(1000))

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def batch_norm(row):
    ours, theirs = build(Normed), nn.parallel.DistributedDataParallel(build(Normed))
    engine = Engine(ours, row)
    optimizer, reference = sgd(ours.parameters()), sgd(theirs.parameters())
    engine.add_optimizer(optimizer)
    xs, ys = data(5, 2 * dist.get_world_size())
    for x, y in zip(xs, ys, strict=True):
        for made in (optimizer, reference):
            made.zero_grad()
        engine.backward(mse(ours, my_share(x), my_share(y)))
        mse(theirs, my_share(x), my_share(y)).backward()
        optimizer.step()
        reference.step()
    error = relative_error(values(engine), theirs.module.parameters())
    buffers = {name: b.tolist() for name, b in ours.norm.named_buffers()}
    expected = {name: b.tolist() for name, b in theirs.module.norm.named_buffers()}
    return error, buffers, expected, engine.report().bytes_sent["broadcast"]


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_buffers_follow_rank_0_as_under_torch_ddp(ranks2, row):
    (error, ours, theirs, sent), (_, other, _, _) = ranks2.run(batch_norm, row)
    # Both average two ranks' gradients in double precision.
    assert error < EXACT
    assert ours == theirs
    assert other == ours  # torch DDP has the other ranks catch up only at the next forward
    # Running mean and variance and the count of batches travel; the constant never does.
    assert sent == (8 + 8) * 8 + 8


# ---------------------------------------------------------------------- optimizers


def many_groups(parameters):
    listed = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in listed if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in listed if p.dim() == 1], "weight_decay": 0.0, "lr": 0.03},
        ],
        lr=0.01,
    )


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_parameter_groups(ranks3, row):
    assert max(ranks3.run(compare, Net, row, many_groups)) < EXACT


def two_optimizers(row):
    """A GAN's alternation: each optimizer's parameters are toggled off while the other trains."""
    ranks = dist.get_world_size()
    alone, module, (xs, ys) = build(Net), build(Net), data(8, ranks)
    parts = [lambda m: [*m.first.parameters(), *m.blocks.parameters()], lambda m: list(m.last.parameters())]
    references = [adamw(part(alone)) for part in parts]
    engine = Engine(module, row)
    optimizers = [sgd(parts[1](module)), adamw(parts[0](module))][::-1]
    references[1] = sgd(parts[1](alone))
    for optimizer in optimizers:
        engine.add_optimizer(optimizer)
    for i in range(8):
        which = i % 2
        for model in (alone, module):
            for index, part in enumerate(parts):
                for parameter in part(model):
                    parameter.requires_grad_(index == which)
        references[which].zero_grad()
        optimizers[which].zero_grad()
        mse(alone, xs[i], ys[i]).backward()
        engine.before_forward()
        engine.backward(mse(module, my_share(xs[i]), my_share(ys[i])))
        references[which].step()
        optimizers[which].step()
        for model in (alone, module):
            model.requires_grad_(True)
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_two_optimizers_that_take_turns(ranks2, row):
    assert max(ranks2.run(two_optimizers, row)) < EXACT


# ---------------------------------------------------------------------- mistakes


def plain_backward(row):
    engine, _ = started(row)
    mse(engine.module, *(t[0] for t in data(1, 1))).backward()


def step_without_reduction(row):
    engine, optimizer = started(row)
    with engine.no_sync():
        engine.backward(mse(engine.module, *(t[0] for t in data(1, 1))))
    optimizer.step()


def sparse(row):
    module = nn.Embedding(10, 4, sparse=True)
    engine = Engine(module, row)
    engine.backward(module(torch.tensor([1, 2])).sum())


def added_later(row):
    engine, _ = started(row)
    engine.module.extra = nn.Linear(2, 2)
    engine.before_forward()


def after_close(row):
    engine, optimizer = started(row)
    engine.close()
    optimizer.step()


def unknown_optimizer(row):
    engine, _ = started(row)
    engine.clip_grad_norm_(torch.optim.SGD([torch.zeros(1)], 0.1), 1.0)


def toggled_differently(row):
    engine, _ = started(row, bucket_cap_mb=0.0001)
    engine.module.last.requires_grad_(dist.get_rank() == 0)
    engine.backward(mse(engine.module, *(t[0] for t in data(1, 1))))


def lazy(row):
    Engine(nn.LazyLinear(2), row)


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        (plain_backward, "RuntimeError", "arrived outside of the engine's backward.*manual_backward"),
        (sparse, "RuntimeError", "dense gradients.*sparse=False"),
        (added_later, "RuntimeError", "'extra.weight' was added, or replaced"),
        (after_close, "RuntimeError", "this one was closed"),
        (unknown_optimizer, "ValueError", "another SGD.*add_optimizer"),
        (
            toggled_differently,
            "RuntimeError",
            "ranks differ in 'last.weight', 'last.bias'|ranks differ in 'last.bias', 'last.weight'",
        ),
        (lazy, "ValueError", "weight.* lazy"),
    ],
)
def test_mistakes_have_clear_errors(ranks2, mistake, kind, message):
    for found, text in ranks2.run_expecting_error(mistake, "zero2"):
        assert found == kind
        assert __import__("re").search(message, text, __import__("re").S), text


@pytest.mark.parametrize("row", ["ddp", "zero1"])
def test_stepping_with_gradients_that_were_never_reduced_is_an_error(ranks2, row):
    for kind, text in ranks2.run_expecting_error(step_without_reduction, row):
        assert kind == "RuntimeError"
        assert "without synchronisation (no_sync)" in text


def test_an_engine_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"initialised torch.distributed process group.*torchrun"):
        Engine(Net(), "ddp")


def differing(what):
    torch.manual_seed(0)
    module = Net()
    if dist.get_rank() == 1:
        if what == "shape":
            module.last = nn.Linear(13, 4)
        elif what == "dtype":
            module.last.double()
        elif what == "name":
            module.extra = module.last
        elif what == "order":
            module.first, module._modules["first"] = module._modules.pop("first"), None
            module._modules["first"] = module.first
        elif what == "frozen":
            module.blocks[1].requires_grad_(False)
        elif what == "buffer":
            module.register_buffer("extra", torch.zeros(2))
    Engine(module, "zero1")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", "rank 0 has parameter 'last.weight': shape (3, 13), torch.float32, trainable, rank 1 has parameter"),
        ("dtype", "rank 1 has parameter 'last.weight': shape (3, 13), torch.float64"),
        ("name", "rank 0 has nothing more, rank 1 has parameter 'extra.weight'"),
        ("frozen", "rank 1 has parameter 'blocks.1.linear.weight': shape (13, 13), torch.float32, frozen"),
        ("buffer", "rank 0 has nothing more, rank 1 has buffer 'extra'"),
    ],
)
def test_ranks_whose_models_differ_all_get_the_first_difference(ranks2, what, message):
    for kind, text in ranks2.run_expecting_error(differing, what):
        assert kind == "ValueError"
        assert message in text
