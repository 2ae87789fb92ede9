"""The user's optimizer under an engine: groups, schedulers, state in and out."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist

from core.toys import (
    ROW_NAMES,
    Net,
    adamw,
    build,
    compare,
    data,
    mse,
    my_share,
    relative_error,
    sgd,
    train,
    train_alone,
    values,
)
from lightning_accel.core import Engine, register_elementwise
from rows import everyday

EXACT = 1e-12  # double precision, two orders of the same sums

OPTIMIZERS = {
    "sgd": sgd,
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def started(row, optimizer=adamw, make=Net, **options):
    module = build(make)
    engine = Engine(module, row, **options)
    made = optimizer(module.parameters())
    engine.add_optimizer(made)
    return engine, made


def compare_by_name(name, row):
    return compare(Net, row, OPTIMIZERS[name], bucket_cap_mb=0.001)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_gives_the_single_device_result(ranks3, name):
    for row in ("ddp", "zero2"):
        assert max(ranks3.run(compare_by_name, name, row)) < EXACT


def groups_around_a_step(row):
    engine, optimizer = started(row, lambda p: torch.optim.AdamW([{"params": list(p)[:3]}], lr=0.1))
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([tuple(p.shape) for p in o.param_groups[0]["params"]]))
    shown = optimizer.param_groups[0]["params"]
    group = optimizer.param_groups[0]
    train(engine, optimizer, 2)
    same = optimizer.param_groups[0] is group and all(
        a is b for a, b in zip(optimizer.param_groups[0]["params"], shown, strict=True)
    )
    return same, all(isinstance(p, torch.nn.Parameter) for p in shown), seen[0]


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_groups_show_the_parameters_but_step_sees_merged_flat_segments(ranks2, row):
    for same, parameters, seen in ranks2.run(groups_around_a_step, row):
        assert same
        assert parameters
        # Three parameters in one segment; a block that is gathered by itself has one of its own.
        assert len(seen) == (2 if row.startswith("fsdp") else 1)
        assert len(seen[0]) == 1


def schedules(row, before):
    alone = build(Net)
    reference = sgd(alone.parameters())
    module = build(Net)
    optimizer = sgd(module.parameters())
    engine = Engine(module, row)
    if not before:
        engine.add_optimizer(optimizer)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=6) for o in (reference, optimizer)]
    if before:
        engine.add_optimizer(optimizer)
    xs, ys = data(5, dist.get_world_size())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in zip(xs, ys, strict=True):
            reference.zero_grad()
            optimizer.zero_grad()
            mse(alone, x, y).backward()
            engine.backward(mse(module, my_share(x), my_share(y)))
            reference.step()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    return relative_error(module.parameters(), alone.parameters())


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("row", ["ddp", "zero2"])
def test_schedulers_work_whether_made_before_or_after_set_up(ranks2, row, before):
    assert max(ranks2.run(schedules, row, before)) < EXACT


def closures(row):
    engine, optimizer = started(row, sgd)
    alone = build(Net)
    reference = sgd(alone.parameters())
    xs, ys = data(3, dist.get_world_size())
    losses = []
    for x, y in zip(xs, ys, strict=True):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = mse(engine.module, my_share(x), my_share(y))
            engine.backward(loss)
            return loss

        def expected(x=x, y=y):
            reference.zero_grad()
            loss = mse(alone, x, y)
            loss.backward()
            return loss

        reference.step(expected)
        losses.append(optimizer.step(closure))
    assert all(isinstance(loss, torch.Tensor) for loss in losses)
    return relative_error(values(engine), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_closures(ranks2, row):
    assert max(ranks2.run(closures, row)) < EXACT


def lbfgs():
    engine, optimizer = started("ddp", lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4))
    alone = build(Net)
    reference = torch.optim.LBFGS(alone.parameters(), lr=0.5, max_iter=4)
    xs, ys = data(1, dist.get_world_size())

    def closure():
        optimizer.zero_grad()
        loss = mse(engine.module, my_share(xs[0]), my_share(ys[0]))
        engine.backward(loss)
        return loss.detach() * 1.0

    def expected():
        reference.zero_grad()
        loss = mse(alone, xs[0], ys[0])
        loss.backward()
        return loss

    optimizer.step(closure)
    reference.step(expected)
    return relative_error(engine.module.parameters(), alone.parameters())


def test_an_optimizer_that_needs_all_parameters_at_once_runs_under_ddp(ranks2):
    # LBFGS looks at the loss value of its own rank, which is not the global one: its curvature sees gradients only.
    assert max(ranks2.run(lbfgs)) < 1e-9


# ----------------------------------------------------------------- state


def states(name, row):
    """An engine's state dict and that of the single process, after three steps."""
    engine, optimizer = started(row, OPTIMIZERS[name], bucket_cap_mb=0.001)
    train(engine, optimizer, 3)
    alone = build(Net)
    reference = OPTIMIZERS[name](alone.parameters())
    train_alone(alone, reference, 3, dist.get_world_size())
    return optimizer.state_dict(), reference.state_dict()


@pytest.mark.parametrize("name", ["sgd", "adamw-fused", "asgd", "adafactor"])
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_state_dicts_are_those_of_the_single_process(ranks3, name, row):
    found = ranks3.run(states, name, row)
    for rank, (ours, theirs) in enumerate(found):
        if rank > 0 and row != "ddp":
            assert ours == {}
            continue
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        for index, expected in theirs["state"].items():
            assert ours["state"][index].keys() == expected.keys()
            for key, value in expected.items():
                mine = ours["state"][index][key]
                if isinstance(value, torch.Tensor):
                    assert mine.shape == value.shape
                    assert mine.dtype == value.dtype
                    torch.testing.assert_close(mine, value, rtol=1e-10, atol=1e-14)
                else:
                    assert mine == value


def continued(name, row, saved):
    """Load a checkpoint of a single process or another row, and go on."""
    engine, optimizer = started(row, OPTIMIZERS[name], bucket_cap_mb=0.002)
    engine.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    xs, ys = data(6, 6)
    for x, y in zip(xs[3:], ys[3:], strict=True):
        optimizer.zero_grad()
        engine.backward(mse(engine.module, my_share(x), my_share(y)))
        optimizer.step()
    state = optimizer.state_dict()
    with engine.full_parameters():
        model = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return {"model": model, "optimizer": state}


def alone_for(name, first, last, saved=None):
    module = build(Net)
    optimizer = OPTIMIZERS[name](module.parameters())
    xs, ys = data(6, 6)
    if saved:
        module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for x, y in zip(xs[first:last], ys[first:last], strict=True):
        optimizer.zero_grad()
        mse(module, x, y).backward()
        optimizer.step()
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("name", ["sgd", "adamw-fused", "asgd", "adafactor"])
def test_state_goes_from_one_device_to_any_row_and_world_and_back(ranks2, ranks3, name):
    early, whole = alone_for(name, 0, 3), alone_for(name, 0, 6)
    further = alone_for(name, 0, 3, whole)
    for row in ROW_NAMES:
        for ranks in (ranks2, ranks3):
            later = ranks.run(continued, name, row, early)[0]
            assert relative_error(later["model"].values(), whole["model"].values()) < EXACT
            again = alone_for(name, 0, 3, later)  # and back on a single device
            assert relative_error(again["model"].values(), further["model"].values()) < EXACT


def misfits(what):
    engine, optimizer = started("zero1")
    train(engine, optimizer, 1)
    reference = adamw(build(Net).parameters())
    module = build(Net)
    reference = adamw(module.parameters())
    train_alone(module, reference, 1, 1)
    saved = reference.state_dict()
    if what == "shapes":
        saved["state"][0]["exp_avg"] = torch.zeros(3)
        saved["state"][2]["exp_avg_sq"] = torch.zeros(2, 2)
    elif what == "groups":
        saved["param_groups"].append(dict(saved["param_groups"][0]))
    elif what == "members":
        saved["param_groups"][0]["params"] = [0, 1]
    elif what == "entry":
        del saved["param_groups"]
    elif what == "number":
        saved["state"][99] = saved["state"][0]
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        (
            "shapes",
            [
                r"first\.weight: 'exp_avg' has shape \(3,\), expected \(13, 7\)",
                r"blocks\.0\.linear\.weight: 'exp_avg_sq' has shape \(2, 2\), expected \(13, 13\)",
            ],
        ),
        ("groups", ["parameter groups: expected 1, got 2"]),
        ("members", ["parameter group 0: expected 10 parameters, got 2"]),
        ("entry", ["missing: the entry 'param_groups'"]),
        ("number", ["unexpected: state of parameter number 99, of 10"]),
    ],
)
def test_state_that_does_not_fit_is_refused_and_all_of_it_listed(ranks2, what, messages):
    for kind, text in ranks2.run_expecting_error(misfits, what):
        assert kind == "ValueError"
        for message in messages:
            assert re.search(message, text), text


def after_closing(row):
    engine, optimizer = started(row)
    train(engine, optimizer, 2)
    before = optimizer.state_dict()
    engine.close()
    return before, optimizer.state_dict()


def test_state_can_be_saved_after_the_engine_was_closed(ranks2):
    (before, after), _ = ranks2.run(after_closing, "zero2")
    for index, saved in before["state"].items():
        assert all(torch.equal(saved[key], after["state"][index][key]) for key in saved)


def stepped_before():
    """An optimizer that has state when it is set up."""
    module = build(Net)
    optimizer = adamw(module.parameters())
    train_alone(module, optimizer, 2, 2)
    engine = Engine(module, "zero2")
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 2)
    alone = build(Net)
    reference = adamw(alone.parameters())
    for _ in range(2):
        train_alone(alone, reference, 2, 2)
    return relative_error(module.parameters(), alone.parameters())


def test_state_from_before_set_up_is_kept(ranks2):
    assert max(ranks2.run(stepped_before)) < EXACT


# --------------------------------------------------------------- mistakes


def foreign():
    module = build(Net)
    Engine(module, "zero1").add_optimizer(adamw(build(Net).parameters()))


def twice():
    engine, _ = started("zero1")
    engine.add_optimizer(sgd([engine.module.last.weight]))


def edited():
    engine, optimizer = started("zero1")
    train(engine, optimizer, 1)
    optimizer.param_groups[0]["params"].pop()
    train(engine, optimizer, 1)


def group_of_another_module():
    engine, optimizer = started("zero1")
    optimizer.add_param_group({"params": build(Net).parameters()})


class ScheduleFree(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def sharded_schedule_free() -> None:
    started("ddp", ScheduleFree)
    started("zero2", ScheduleFree)


def sharded_lbfgs():
    started("zero1", torch.optim.LBFGS)


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        (foreign, "ValueError", r"parameter 0 of group 0 \(shape \(13, 7\)\) does not.*'first.weight' has that shape"),
        (twice, "ValueError", r"'last.weight' is in a AdamW already"),
        (edited, "RuntimeError", "changed in place.*add_param_group"),
        (group_of_another_module, "ValueError", "belong to the Net that was set up"),
        (sharded_lbfgs, "ValueError", "LBFGS.*strategy='accel_ddp'"),
        (sharded_schedule_free, "ValueError", "in step\\(\\) only, got ScheduleFree, .*strategy='accel_ddp'"),
    ],
)
def test_mistakes_have_clear_errors(ranks2, mistake, kind, message):
    for found, text in ranks2.run_expecting_error(mistake):
        assert found == kind
        assert re.search(message, text, re.DOTALL), text


class Normalised(torch.optim.SGD):
    """Divides each gradient by its norm: wrong on a piece of a parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(parameter.grad.norm())
        return super().step(closure)


class Signed(torch.optim.Optimizer):
    """Elementwise, but nobody knows."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def normalised(parameters):
    return Normalised(parameters, lr=0.05)


def segments_of(make, register):
    if register:
        register_elementwise(make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, optimizer = started("zero2", make)
    engine.build()
    whole = {segment.whole for segment in engine.optimizers[0].segments}
    return whole, [str(w.message) for w in caught]


def test_an_unknown_optimizer_gets_whole_tensors_and_a_warning(ranks2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert max(ranks2.run(compare, Net, "zero2", normalised)) < EXACT
    for whole, messages in ranks2.run(segments_of, normalised, register=False):
        assert whole == {True}
        assert any("Normalised is not known" in message for message in messages)


def test_an_optimizer_can_be_declared_elementwise(ranks2):
    for whole, messages in ranks2.run(segments_of, Signed, register=True):
        assert whole == {False}
        assert messages == []


def balance(ranks_count):
    engine, optimizer = started("zero2", lambda p: torch.optim.Adafactor(p, lr=0.01), lambda: Net(64, 8))
    train(engine, optimizer, 1)
    report = engine.report()
    return report.at_rest["gradients"], report.padding["gradients"], report.padding["parameters"]


def test_whole_tensors_are_balanced_over_ranks_without_padding(ranks3):
    found = ranks3.run(balance, 3)
    loads = [load for load, _, _ in found]
    assert all(padding == 0 for _, *paddings in found for padding in paddings)
    assert sum(loads) == sum(p.numel() for p in Net(64, 8).parameters()) * 8
    # Eight like matrices on three ranks: 3, 3, 2.
    assert max(loads) <= 1.15 * sum(loads) / 3


def trained_by_two_in_turn(row, make_optimizer):
    """One optimizer after another on one engine, as in two fits of a model that stays in parts."""
    alone, module = build(Net), build(Net)
    engine = Engine(module, row, bucket_cap_mb=0.0005)
    former, states = None, []
    for _ in range(2):
        train_alone(alone, reference := make_optimizer(alone.parameters()), 3, dist.get_world_size())
        optimizer = make_optimizer(module.parameters())
        engine.add_optimizer(optimizer)
        train(engine, optimizer, 3)
        module(data(1, 1)[0][0])  # no backward follows
        engine.dismiss_optimizers()
        assert not any(unit.memory.is_sharded and unit.memory.presence.name == "HERE" for unit in engine.units)
        former, states = optimizer, [optimizer.state_dict(), reference.state_dict()]
    assert all(parameter.grad is None for parameter in module.parameters())
    assert engine.report().at_rest["gradients"] == 0
    with pytest.raises(RuntimeError, match="of a fit that has ended"):
        former.step()
    with pytest.raises(ValueError, match="Expected an optimizer that was given to this engine"):
        engine.clip_grad_norm_(former, 1.0)
    error = relative_error(values(engine), alone.parameters())
    engine.close()
    saved, expected = states
    if dist.get_rank() > 0 and row != "ddp":
        assert saved == {}
        return error, 0.0
    pairs = [(saved["state"][i][key], value) for i, entry in expected["state"].items() for key, value in entry.items()]
    tensors = [(a, b) for a, b in pairs if isinstance(b, torch.Tensor)]
    return error, relative_error([a for a, _ in tensors], [b for _, b in tensors])


@pytest.mark.parametrize("make_optimizer", [adamw, torch.optim.Adafactor])
@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_optimizers_may_take_turns_on_an_open_engine(ranks2, row, make_optimizer):
    for error, state in ranks2.run(trained_by_two_in_turn, row, make_optimizer):
        assert error < EXACT
        assert state < EXACT
