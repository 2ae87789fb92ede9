"""Live bytes by kind, of small real tensors."""

from __future__ import annotations

import torch

from lightning_accel.core.memory import taken
from lightning_accel.planning.ledger import KINDS, Ledger

KB = 1024


def kb(size: float) -> torch.Tensor:
    return torch.empty(int(size * KB), dtype=torch.uint8)


def live(ledger: Ledger) -> dict[str, int]:
    return {kind: size for kind, size in ledger.now.items() if size}


def test_memory_comes_and_goes() -> None:
    with Ledger() as ledger:
        a = kb(1)
        view = a[10:]
        assert live(ledger) == {"temporary": KB}
        del a
        assert live(ledger) == {"temporary": KB}  # the view keeps it
        del view
        assert live(ledger) == {}


def test_what_was_there_before_is_known_once_it_is_named() -> None:
    weight = kb(3)
    with Ledger() as ledger:
        assert live(ledger) == {}
        ledger.label([weight], "parameters")
        weight.add_(1)
        assert live(ledger) == {"parameters": 3 * KB}


def test_storages_that_are_resized() -> None:
    with Ledger() as ledger:
        buffer = taken(kb(4), "gathered")
        buffer.untyped_storage().resize_(0)
        assert live(ledger) == {}
        buffer.untyped_storage().resize_(4 * KB)
        assert live(ledger) == {"gathered": 4 * KB}
        buffer.resize_(8 * KB)
        assert live(ledger) == {"gathered": 8 * KB}
    before = torch.UntypedStorage.resize_
    with Ledger():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


def test_activations_are_what_forward_leaves() -> None:
    weight = torch.ones(KB, requires_grad=True)
    with Ledger() as ledger:
        ledger.label([weight], "parameters")
        ledger.enter("forward")
        loss = (weight.exp() + 1).sum()  # keeps the exponentials; the sum with one goes
        ledger.enter("backward")
        assert ledger.now["activations"] == 4 * KB + 4
        loss.backward()
        assert live(ledger) == {"parameters": 4 * KB, "activations": 4, "temporary": 4 * KB}


def test_recomputation_makes_activations() -> None:
    weight = torch.ones(KB, requires_grad=True)
    with Ledger() as ledger:
        ledger.enter("forward")
        loss = torch.utils.checkpoint.checkpoint(lambda w: w.exp().sum(), weight, use_reentrant=False)
        ledger.enter("backward")
        assert ledger.now["activations"] == 4
        with ledger.recording() as courses:
            loss.backward()
    assert max(moment["activations"] for moment in courses[0].moments) >= 4 * KB


def test_a_course_has_every_moment_and_kinds_that_were_known_later() -> None:
    with Ledger() as ledger:
        kept = kb(1)
        with ledger.recording() as courses:
            ledger.enter("step")
            state = kb(2)
            passing = kb(5)
            del passing
            ledger.label([state], "optimizer_state")
        del kept
    (course,) = courses
    found = [(moment["temporary"] // KB, moment["optimizer_state"] // KB) for moment in course.moments]
    assert found == [(1, 0), (1, 2), (6, 2), (1, 2)]
    assert course.phases == ["rest", "step", "step", "step"]
    assert course.peak == {**dict.fromkeys(KINDS, 0), "temporary": 6 * KB, "optimizer_state": 2 * KB}
    assert course.peak_of(["optimizer_state"]) == 2 * KB
    assert course.peak_of(["gathered"]) == 0
