"""The batch arithmetic."""

from __future__ import annotations

import pytest

from lightning_accel.deepspeed_config import Batches


@pytest.mark.parametrize(
    ("ranks", "train", "micro", "accumulation"),
    [(2, 32, 16, 1), (2, 32, 8, 2)],
)
def test_what_adds_up(ranks: int, train: int, micro: int, accumulation: int) -> None:
    assert Batches.of(ranks, train, micro, accumulation, "ds.json") == Batches(ranks, train, micro, accumulation)


@pytest.mark.parametrize(
    ("ranks", "train", "micro", "accumulation", "total"),
    [(2, 33, 17, 2, 68), (2, 32, 18, 1, 36)],
)
def test_what_does_not(ranks: int, train: int, micro: int, accumulation: int, total: int) -> None:
    with pytest.raises(
        ValueError,
        match=f"in ds.json, got {train} = {micro} × {accumulation} × {ranks}"
        rf"\? {micro} × {accumulation} × {ranks} = {total}\.$",
    ):
        Batches.of(ranks, train, micro, accumulation, "ds.json")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((32, 8, None), (32, 8, 2)),
        ((32, None, 2), (32, 8, 2)),
        ((None, 8, 2), (32, 8, 2)),
        ((32, None, None), (32, 16, 1)),
        ((None, 8, None), (16, 8, 1)),
    ],
)
def test_what_is_missing_follows(
    given: tuple[int | None, int | None, int | None], expected: tuple[int, int, int]
) -> None:
    assert Batches.of(2, *given, "ds.json") == Batches(2, *expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((33, None, None), r"33 = 16 × 1 × 2\? 16 × 1 × 2 = 32 \(micro-batch and accumulation computed"),
        ((33, 8, None), r"33 = 8 × 2 × 2\? .* = 32 \(accumulation computed"),
        ((8, 8, None), r"8 = 8 × 1 × 2\? .* = 16"),
        ((1, None, None), r"1 = 1 × 1 × 2\?"),
        ((None, None, 4), "got neither"),
    ],
)
def test_what_follows_must_add_up(given: tuple[int | None, int | None, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches.of(2, *given, "ds.json")
