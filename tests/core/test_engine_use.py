"""What users do around training steps: evaluation, values read and changed, a second engine, interruptions, the end."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist

from core.toys import EXACT, ROW_NAMES, Net, adamw, build, data, mse, prepared, relative_error, train, values
from lightning_accel.core import Engine
from lightning_accel.core.neighbours import Neighbours
from rows import everyday

# ---------------------------------------------------------------------- evaluation


def evaluated_first(row):
    engine, optimizer = prepared(row)
    x, y = (tensor[0] for tensor in data(1, dist.get_world_size()))
    with torch.inference_mode(), engine.forward_context():
        engine.module(x)
    train(engine, optimizer, 2)
    return True


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_the_first_forward_may_be_in_inference_mode(ranks2, row):
    assert all(ranks2.run(evaluated_first, row))


def unevenly_evaluated(row):
    engine, optimizer = prepared(row)
    train(engine, optimizer, 1)
    with torch.no_grad():
        for _ in range(5 * dist.get_rank()):  # one rank has more batches than the other
            with engine.forward_context():
                engine.module(data(1, 1)[0][0])
    train(engine, optimizer, 1)
    return values(engine)


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_ranks_may_evaluate_a_different_number_of_batches(ranks2, row):
    ours, theirs = ranks2.run(unevenly_evaluated, row)
    assert relative_error(ours, theirs) == 0


def evaluated_by_one(row, make_optimizer):
    engine, optimizer = prepared(row, optimizer=make_optimizer)
    train(engine, optimizer, 1)
    engine.dismiss_optimizers()
    if dist.get_rank() == 0:
        with torch.no_grad(), engine.forward_context():
            engine.module(data(1, 1)[0][0])
    dist.barrier()
    engine.close()
    return True


@pytest.mark.parametrize("make_optimizer", [adamw, torch.optim.Adafactor])
def test_one_rank_may_evaluate_when_optimizers_have_gone(ranks2, make_optimizer):
    assert ranks2.run(evaluated_by_one, "fsdp", make_optimizer) == [True] * 2


# ---------------------------------------------------------------------- values and state


def read_right_after_the_step(row):
    engine, optimizer = prepared(row)
    seen = []
    optimizer.register_step_post_hook(
        lambda o, *_: seen.append([p.detach().clone() for group in o.param_groups for p in group["params"]])
    )
    held = list(engine.module.parameters())
    train(engine, optimizer, 2)
    found = [p.detach().clone() for p in held]
    final = values(engine)
    return relative_error(found, final), relative_error(seen[-1], final)


@pytest.mark.parametrize("row", ["ddp", "zero1", "zero2"])
def test_lists_of_parameters_and_hooks_of_the_step_see_the_final_values(ranks3, row):
    assert ranks3.run(read_right_after_the_step, row) == [(0.0, 0.0)] * 3


def changed_and_kept(row):
    engine, optimizer = prepared(row)
    train(engine, optimizer, 1)
    with engine.full_parameters(writeback=True), torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.fill_(2.0)
    return all(bool((value == 2).all()) for value in values(engine))


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_changes_to_whole_parameters_are_kept_if_asked_for(ranks3, row):
    assert all(ranks3.run(changed_and_kept, row))


def within_forward(row):
    engine, _ = prepared(row)
    engine.build()
    engine.module.blocks[0].linear.register_forward_hook(lambda *_: engine.full_parameters().__enter__())
    with pytest.raises(RuntimeError, match="between steps, got it within the model's forward"):
        engine.module(data(1, 1)[0][0])
    return True


@pytest.mark.parametrize("row", ["fsdp", "fsdp_partial"])
def test_whole_parameters_are_not_to_be_had_within_a_block(ranks2, row):
    assert all(ranks2.run(within_forward, row))


def one_rank_has_the_state(row):
    engine, optimizer = prepared(row)
    train(engine, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    return (
        state.keys() == again.keys()
        and all(
            torch.equal(values["exp_avg"], again["state"][index]["exp_avg"]) for index, values in state["state"].items()
        )
        if state
        else again == {}
    )


@pytest.mark.parametrize("row", ["zero1", "zero2", "fsdp"])
def test_a_state_dict_loads_as_it_was_given(ranks2, row):
    assert all(ranks2.run(one_rank_has_the_state, row))


# ---------------------------------------------------------------------- a second engine


def same_optimizer_twice(row):
    module = build(Net)
    optimizer = adamw(module.parameters())
    for _ in range(2):
        engine = Engine(module, row)
        engine.add_optimizer(optimizer)
        train(engine, optimizer, 2)
        engine.close()
    alone = build(Net)
    reference = adamw(alone.parameters())
    xs, ys = data(2, dist.get_world_size())
    for _ in range(2):
        for x, y in zip(xs, ys, strict=True):
            reference.zero_grad()
            mse(alone, x, y).backward()
            reference.step()
    return relative_error(module.parameters(), alone.parameters())


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_an_optimizer_goes_on_under_a_second_engine(ranks3, row):
    assert max(ranks3.run(same_optimizer_twice, row)) < EXACT


def second_engine(row):
    module = build(Net)
    first = Engine(module, row)
    first.build()
    engine = Engine(module, row)
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    train(engine, optimizer, 1)
    return first.is_closed


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_second_engine_closes_the_first(ranks2, row):
    assert all(ranks2.run(second_engine, row))


# ---------------------------------------------------------------------- interruptions


def interrupted(row):
    engine, optimizer = prepared(row)
    train(engine, optimizer, 1)
    unit = next(iter(engine._arrivals.waits))
    unit_wait = engine._arrivals.waits[unit]
    pending = unit_wait.__closure__[unit_wait.__code__.co_freevars.index("pending")].cell_contents
    real = pending.wait
    pending.wait = lambda: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        unit.parameters[0].sum()
    pending.wait = real
    held = unit.parameters[0].detach().clone()  # waits again
    engine.wait()
    return torch.equal(held, unit.parameters[0])


def test_an_interrupted_wait_is_repeated(ranks2):
    assert all(ranks2.run(interrupted, "zero2"))


def out_of_step():
    engine, optimizer = prepared("zero2", bucket_cap_mb=0.0005)
    train(engine, optimizer, 1)
    engine.wait()
    meet, calls = Neighbours.meet, []

    def failing(self, number, doing):
        calls.append(number)
        if dist.get_rank() == 0 and len(calls) == 2:
            raise OSError("injected")
        return meet(self, number, doing)

    Neighbours.meet = failing
    try:
        train(engine, optimizer, 1)
    except (OSError, RuntimeError) as error:
        return str(error)
    finally:
        Neighbours.meet = meet
        engine.close(abandon=True)
    return None


def test_after_an_error_in_an_operation_no_later_one_seems_to_succeed(ranks2):
    ours, theirs = ranks2.run(out_of_step)
    assert ours is not None
    assert theirs is not None
    ranks2.close()  # their messages are out of step


# ---------------------------------------------------------------------- what is left


def forgotten(row):
    before = threading.active_count()
    engine, optimizer = prepared(row)
    train(engine, optimizer, 1)
    engine.close()
    module, added = weakref.ref(engine.module), threading.active_count() - before
    del engine, optimizer
    gc.collect()
    return added, module() is None


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_a_closed_engine_leaves_nothing_behind(ranks2, row):
    assert ranks2.run(forgotten, row) == [(0, True)] * 2


def forgotten_open(row):
    engine, optimizer = prepared(row)
    train(engine, optimizer, 1)
    found = [weakref.ref(engine), weakref.ref(engine.module), weakref.ref(optimizer), weakref.ref(engine.units[0])]
    del engine, optimizer
    gc.collect()
    return [reference() is None for reference in found]


@pytest.mark.parametrize("row", everyday(ROW_NAMES))
def test_an_open_engine_that_nobody_has_any_more_leaves_nothing_behind(ranks2, row):
    assert ranks2.run(forgotten_open, row) == [[True] * 4] * 2


def looked_at_and_laid_out_anew():
    module = build(Net)
    engine = Engine(module, "fsdp")
    engine.build()
    former = [weakref.ref(unit) for unit in engine.units]
    with engine.full_parameters():
        pass
    engine.add_optimizer(torch.optim.Adafactor(module.parameters()))
    engine.build()
    gc.collect()
    return sum(reference() is not None for reference in former)


def test_units_that_were_looked_at_and_taken_apart_are_freed(ranks2):
    assert ranks2.run(looked_at_and_laid_out_anew) == [0, 0]
