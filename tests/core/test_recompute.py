"""Activation checkpointing: same numbers, fewer saved activations, not one gather more, and no trace on the module."""

import copy
import functools
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from core.toys import ROW_NAMES, Net, adamw, build, data, mse, my_share, relative_error, train, train_alone, values
from lightning_accel.core import Engine, Rest
from lightning_accel.core.placement import find_row
from lightning_accel.core.recompute import recompute
from rows import everyday

# Double precision. The operations are the same ones, but gradients that meet may be added up in another order: 1e-16.
EXACT = 1e-12
REENTRANT = {"use_reentrant": True}


def sparing(context, operator, *args, **kwargs):
    """A selective policy: keep what matrix products give, compute the rest again."""
    keep = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


OPTIONS = {
    "default": {},
    "reentrant": REENTRANT,
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, sparing)},
    "in full": {"early_stop": False, "determinism_check": "none"},
}


class Rich(nn.Module):
    """Dropout, several inputs and outputs, tensors within containers, keyword arguments with names of torch's own."""

    calls = 0

    def __init__(self, width=13):
        super().__init__()
        self.linear, self.gate, self.dropout = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x, pair, *, debug, table):
        if not torch.compiler.is_compiling():  # which takes no side effects in what is recomputed
            type(self).calls += 1
        first, second = pair
        hidden = self.dropout(torch.tanh(self.linear(x) + first))
        hidden = torch.sin(hidden * torch.sigmoid(self.gate(debug + second)))
        return {"x": x + hidden, "rest": [hidden * table["scale"], None, 3]}


class RichNet(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Rich() for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        second = x
        for block in self.blocks:
            out = block(x, (second, x * 2), debug=x, table={"scale": x.mean()})
            x, second = out["x"], out["rest"][0]
        return self.last(x + second)


def trained(row, make, options, modules=None):
    """Parameters after three steps of two backwards, gathers of a step, and forwards of blocks."""
    module = build(make)
    engine = Engine(module, row)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    if options is not None:
        engine.at_close.callback(recompute((modules or (lambda m: m.blocks))(module), options))
    torch.manual_seed(dist.get_rank())  # of dropout
    Rich.calls = 0
    train(engine, optimizer, 3, accumulate=2)
    return values(engine), engine.report().collectives, Rich.calls


def with_and_without(row, make, kinds, modules=None):
    plain, sent, calls = trained(row, make, None)
    found = {}
    for kind in kinds:
        again, sent_again, calls_again = trained(row, make, OPTIONS[kind], modules)
        found[kind] = relative_error(again, plain), sent_again == sent, calls_again / max(calls, 1)
    return found


LOCAL = replace(find_row("fsdp"), accumulating=Rest.REPLICATED)
"""Parameters stay gathered, and gradients whole, while micro-batches accumulate."""


@pytest.mark.parametrize("row", [*everyday(ROW_NAMES), pytest.param(LOCAL, id="fsdp, local accumulation")])
def test_same_numbers_same_dropout_and_no_gather_more(ranks2, row):
    for found in ranks2.run(with_and_without, row, RichNet, list(OPTIONS)):
        for error, same_traffic, calls in found.values():
            assert error < EXACT
            assert same_traffic
            assert calls == 2


class Stateful(nn.Module):
    """Its last operation is not needed for backward."""

    def __init__(self):
        super().__init__()
        self.linear, self.ran = nn.Linear(13, 13), []

    def forward(self, x):
        x = x + torch.tanh(self.linear(x))
        self.ran.append(torch.is_grad_enabled())
        return x


class StatefulNet(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Stateful() for _ in range(3))


def stopped_early(row):
    plain, sent, _ = trained(row, StatefulNet, None)
    module = build(StatefulNet)
    engine = Engine(module, row)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    recompute(module.blocks)
    train(engine, optimizer, 3, accumulate=2)
    ran = [len(block.ran) for block in module.blocks]
    return relative_error(values(engine), plain), engine.report().collectives == sent, ran


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_recomputation_stops_early(ranks2, row):
    for error, same_traffic, ran in ranks2.run(stopped_early, row):
        assert error < EXACT
        assert same_traffic
        assert ran == [6, 6, 6]  # in forward only


class Nested(nn.Module):
    """Recomputes a part of itself, by the user's own call."""

    reentrant = False

    def __init__(self):
        super().__init__()
        self.linear, self.inner = nn.Linear(13, 13), nn.Sequential(nn.Linear(13, 13), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x):
        return x + checkpoint(self.inner, torch.tanh(self.linear(x)), use_reentrant=self.reentrant)


class NestedReentrant(Nested):
    reentrant = True


def nested_net(kind):
    net = Net()
    net.blocks = nn.ModuleList(kind() for _ in range(3))
    return net


def inner_and_outer(module):
    return [*module.blocks, *(block.linear for block in module.blocks)]


@pytest.mark.parametrize("kind", [Nested, NestedReentrant])
@pytest.mark.parametrize("row", ["zero2", "fsdp", "fsdp_partial"])
def test_nested(ranks2, row, kind):
    make = functools.partial(nested_net, kind)
    for found in ranks2.run(with_and_without, row, make, ["default", "reentrant"], inner_and_outer):
        for error, same_traffic, _ in found.values():
            assert error < EXACT
            assert same_traffic


def of_everything(module):
    return [module]


@pytest.mark.parametrize("row", ["ddp", "fsdp", "fsdp_partial"])
def test_a_module_that_holds_units_gathers_nothing_more(ranks2, row):
    for found in ranks2.run(with_and_without, row, RichNet, ["default"], of_everything):
        error, same_traffic, calls = found["default"]
        assert error < EXACT
        assert same_traffic
        assert calls == 2


def by_the_user(row, how):
    """torch's own ways, with which the engine has nothing to do."""
    plain, sent, _ = trained(row, Net, None)
    module = build(Net)
    kind = CheckpointImpl.REENTRANT if how == "wrapper, reentrant" else CheckpointImpl.NO_REENTRANT
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    if how == "applied late":
        engine = Engine(module, row)
        apply_activation_checkpointing(
            module, checkpoint_wrapper_fn=wrap, check_fn=lambda m: m in set(module.blocks.children())
        )
    else:
        for index, block in enumerate(module.blocks):
            module.blocks[index] = wrap(block)
        engine = Engine(module, row)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 3, accumulate=2)
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    now = engine.report().collectives
    return relative_error(values(engine), plain), [now.get(k) for k in kinds] == [sent.get(k) for k in kinds]


@pytest.mark.parametrize("how", ["wrapper", "wrapper, reentrant", "applied late"])
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_wrappers_of_torch_go_on_to_work(ranks2, row, how):
    for error, same_traffic in ranks2.run(by_the_user, row, how):
        assert error < EXACT
        assert same_traffic


# --------------------------------------------------------------------- memory


class Deep(nn.Sequential):
    """Four tensors are saved for backward: what goes into each layer, where tanh shares its own with the next."""

    def __init__(self):
        super().__init__(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.GELU(), nn.Linear(7, 7))


def saved_bytes(row, options):
    """Bytes that autograd keeps between forward and backward, without parameters."""
    module = build(lambda: nn.Sequential(*(Deep() for _ in range(4))))
    engine = Engine(module, row)
    engine.add_optimizer(adamw(module.parameters()))
    if options is not None:
        recompute(module.children(), options)
    x = data(1, dist.get_world_size())[0][0]
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), engine.forward_context():
        loss = module(x).sum()
    units = {unit.flat.untyped_storage()._cdata for unit in engine.units}
    found = sum(storage.nbytes() for key, storage in storages.items() if key not in units)
    engine.backward(loss)
    return found, x.untyped_storage().nbytes()


@pytest.mark.parametrize("row", ["zero2", "fsdp"])
def test_only_the_inputs_of_modules_are_kept(ranks2, row):
    plain = ranks2.run(saved_bytes, row, None)
    for options in ({}, REENTRANT):
        for (kept, one), (whole, _) in zip(ranks2.run(saved_bytes, row, options), plain, strict=True):
            assert kept == 4 * one  # each block's input
            assert whole >= 12 * one  # and the outputs of linear and tanh


# ------------------------------------------------------------- one process


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("options", [{}, REENTRANT], ids=["default", "reentrant"])
def test_inputs_that_need_no_gradient(options):
    block = build(lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh()))
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = gradients(block, block(x).sum())
    recompute([block], options)
    for ours, theirs in zip(gradients(block, block(x).sum()), expected, strict=True):
        assert torch.equal(ours, theirs)  # torch's reentrant kind gives none, with a warning
    block.requires_grad_(False)
    assert not block(x).requires_grad


@dataclass
class Opaque:
    x: torch.Tensor


class Hiding(nn.Linear):
    def forward(self, x):
        return Opaque(super().forward(x))


def test_the_reentrant_kind_refuses_outputs_whose_gradients_it_would_lose():
    block = Hiding(7, 3)
    expected = gradients(block, block(torch.ones(2, 7)).x.sum())
    undo = recompute([block])
    assert relative_error(gradients(block, block(torch.ones(2, 7)).x.sum()), expected) == 0
    undo()
    recompute([block], REENTRANT)
    with pytest.raises(RuntimeError, match="Expected Hiding to return tensors.*got a Opaque.*use_reentrant=False"):
        block(torch.ones(2, 7))


def test_active_in_training_with_gradients_only():
    block = Rich()
    recompute([block])
    x = torch.ones(2, 13)

    def forwards():
        Rich.calls = 0
        out = block(x, (x, x), debug=x, table={"scale": x.mean()})["x"]
        if out.requires_grad:
            out.sum().backward()
        return Rich.calls

    assert forwards() == 2
    with torch.no_grad():
        assert forwards() == 1
    block.eval()
    assert forwards() == 1


@pytest.mark.parametrize("options", [{}, REENTRANT], ids=["default", "reentrant"])
def test_parameters_that_changed_since_forward_are_refused(options):
    block = nn.Linear(3, 3)
    recompute([block], options)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    first, second = (block(torch.ones(1, 3, requires_grad=True)).sum() for _ in range(2))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="Expected the parameters of Linear to stay .* modified by an inplace"):
        second.backward()


def test_no_trace_on_the_module():
    module = build(Net)
    before = copy.deepcopy(module)
    undo = recompute(module.blocks)
    assert list(module.state_dict()) == list(before.state_dict())
    assert [name for name, _ in module.named_modules()] == [name for name, _ in before.named_modules()]
    assert [type(m) for m in module.modules()] == [type(m) for m in before.modules()]
    x = torch.randn(2, 7, dtype=torch.float64)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(copy.deepcopy(module))):
        with torch.no_grad():
            copied.blocks[0].linear.weight.zero_()
            before.blocks[0].linear.weight.zero_()
            assert torch.equal(copied(x), before(x))  # it is the copy that computes
        assert b"lightning_accel.core.recompute" not in pickle.dumps(copied)
    assert b"lightning_accel.core.recompute" not in pickle.dumps(module)
    assert "forward" in vars(module.blocks[0])
    undo()
    undo()
    assert all("forward" not in vars(block) for block in module.blocks)


def test_a_forward_of_the_users_own_is_given_back():
    block = nn.Linear(3, 3)
    own = block.forward = functools.partial(nn.functional.linear, weight=block.weight)
    undo = recompute([block])
    assert copy.deepcopy(block)(torch.ones(1, 3)).shape == (1, 3)
    undo()
    assert block.forward is own
    undo = recompute([block])
    ours = block.forward
    later = block.forward = lambda x: ours(x) * 2
    undo()
    assert block.forward is later  # stays, and what it calls is as before
    assert torch.equal(block(torch.ones(1, 3)), own(torch.ones(1, 3)) * 2)


def set_up_twice(row):
    module = build(RichNet)
    for _ in range(2):
        engine = Engine(module, row)
        optimizer = adamw(module.parameters())
        engine.add_optimizer(optimizer)
        engine.at_close.callback(recompute(module.blocks))
        Rich.calls = 0
        train(engine, optimizer, 1)
    engine.close()
    return Rich.calls, any("forward" in vars(block) for block in module.blocks)


@pytest.mark.parametrize("row", ["ddp", "fsdp"])
def test_setting_up_again_does_not_nest_and_closing_undoes(ranks2, row):
    assert ranks2.run(set_up_twice, row) == [(6, False)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve_rng": True}, "Expected options of torch.utils.checkpoint .*preserve_rng_state.*got 'preserve_rng'"),
        ({"use_reentrant": True, "debug": True}, "Expected no 'debug' together with use_reentrant=True"),
        ({"args": ()}, "got 'args'"),
    ],
)
def test_options_that_do_not_exist_or_have_no_effect(options, message):
    with pytest.raises(ValueError, match=message):
        recompute([nn.Linear(2, 2)], options)


def on_the_share(row):  # keeps the data helpers honest: a rank's part of a batch with reentrant kind and frozen input
    module = build(Net)
    module.first.requires_grad_(False)
    engine = Engine(module, row)
    optimizer = adamw([p for p in module.parameters() if p.requires_grad])
    engine.add_optimizer(optimizer)
    recompute(module.blocks, REENTRANT)
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    engine.backward(mse(module, my_share(x), my_share(y)))
    alone = build(Net)
    mse(alone, x, y).backward()
    mine = [engine.full_gradient(p) for p in module.blocks.parameters()]
    return relative_error(mine, [p.grad for p in alone.blocks.parameters()])


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_reentrant_after_frozen_layers(ranks2, row):
    assert max(ranks2.run(on_the_share, row)) < EXACT


def penalised(module, x, y):
    """The gradient of the output to the input is part of the loss: a backward within forward, and of it once more."""
    x = x.clone().requires_grad_()
    out = module(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return ((out - y) ** 2).mean() + (slope**2).mean()


class Recomputing(Net):
    """Recomputes its blocks by the user's own call, to their very end."""

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, early_stop=False)
        return self.last(x)


def gradients_within_the_loss(row, make):
    module = build(make)
    engine = Engine(module, row)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    if make is Net:
        recompute(module.blocks)
    train(engine, optimizer, 3, loss=penalised)
    alone = build(Net)
    train_alone(alone, adamw(alone.parameters()), 3, dist.get_world_size(), penalised)
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("make", [Net, Recomputing])
@pytest.mark.parametrize("row", ["zero2", "fsdp", "fsdp_partial"])
def test_gradients_within_the_loss(ranks2, row, make):
    assert max(ranks2.run(gradients_within_the_loss, row, make)) < EXACT
