"""Where DeepSpeed keeps the elements of parameters, in numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel.convert.deepspeed_layout import cut_by_group, cut_by_parameter, given_order, parts_of

SHAPES = {"a": (2, 3), "b": (1,), "c": (4,)}


def test_stages_1_and_2_cut_the_group() -> None:
    # aaaaaab|cccc.  with 2 elements after b that are nothing's: aaaaaab | ..cccc
    assert cut_by_group(SHAPES, [6, 6], [0, 0, 0]) == {"a": [(0, 0, 6)], "b": [(1, 0, 1)], "c": [(1, 1, 4)]}
    assert cut_by_group(SHAPES, [8, 8], [0, 2, 0]) == {"a": [(0, 0, 6)], "b": [(0, 6, 1)], "c": [(1, 1, 4)]}
    assert cut_by_group(SHAPES, [4, 4, 3], [0, 0, 0]) == {
        "a": [(0, 0, 4), (1, 0, 2)],
        "b": [(1, 2, 1)],
        "c": [(1, 3, 1), (2, 0, 3)],
    }


def test_stage_3_cuts_each_parameter() -> None:
    # rank 0: aaa b cc, rank 1: aaa . cc
    assert cut_by_parameter(SHAPES, [6, 6]) == {
        "a": [(0, 0, 3), (1, 0, 3)],
        "b": [(0, 3, 1), (1, 3, 0)],
        "c": [(0, 4, 2), (1, 4, 2)],
    }
    assert parts_of(4, 3) == [2, 2, 0]


@pytest.mark.parametrize("lengths", [[5, 5], [6, 9], [13]])
def test_parts_of_another_group_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="to have 11 elements over all ranks, as its shapes say, got 1"):
        cut_by_group(SHAPES, lengths, [0, 0, 0])
    with pytest.raises(ValueError, match="elements over all ranks"):
        cut_by_parameter(SHAPES, lengths)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 3))
def test_every_element_is_found_once(numels: list[int], ranks: int, padding: int) -> None:
    shapes = {str(index): (numel,) for index, numel in enumerate(numels)}
    paddings = [padding] * (len(numels) - 1) + [0]
    part = math.ceil((sum(numels) + sum(paddings)) / ranks)
    if ranks * part - sum(numels) - sum(paddings) < 2 * ranks:
        places = cut_by_group(shapes, [part] * ranks, paddings)
        assert [sum(length for *_, length in places[name]) for name in shapes] == numels
        cells = [(rank, at) for found in places.values() for rank, start, n in found for at in range(start, start + n)]
        assert cells == sorted(set(cells))  # one after another, none twice
        assert all(at < part for _, at in cells)
    places = cut_by_parameter(shapes, [sum(math.ceil(numel / ranks) for numel in numels)] * ranks)
    assert [sum(length for *_, length in places[name]) for name in shapes] == numels


@given(st.integers(0, 12), st.integers(1, 5))
def test_round_robin_is_undone(count: int, ranks: int) -> None:
    names = [f"{index:02}" for index in range(count)]
    dealt = [name for rank in range(ranks) for name in names[rank::ranks]]
    assert given_order(dealt, ranks) == names
