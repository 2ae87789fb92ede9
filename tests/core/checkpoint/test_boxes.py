"""Which boxes a range of elements is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from lightning_accel.core.checkpoint.boxes import Box, boxes_of_range, memory_order
from lightning_accel.core.checkpoint.shard import ranged

shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)


def numbers(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose elements are their own positions in row-major order."""
    return torch.arange(math.prod(shape)).view(shape)


def part(data: DataObject, size: int) -> tuple[int, int]:
    start = data.draw(st.integers(0, size), "start")
    return start, data.draw(st.integers(start, size), "stop")


def end_to_end(boxes: list[Box], tensor: torch.Tensor) -> list[int]:
    return [number for box in boxes for number in box.of(tensor).flatten().tolist()]


def test_the_drawn_range() -> None:
    assert boxes_of_range((4, 4), 3, 14) == [Box((0, 3), (1, 1)), Box((1, 0), (2, 4)), Box((3, 0), (1, 2))]


@given(shapes, st.data())
def test_the_boxes_of_a_range_are_its_elements_end_to_end(shape: tuple[int, ...], data: DataObject) -> None:
    start, stop = part(data, math.prod(shape))
    boxes = boxes_of_range(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel > 0 for box in boxes)
    assert end_to_end(boxes, numbers(shape)) == list(range(start, stop))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_no_range_needs_more_boxes_and_some_need_as_many(dims: int) -> None:
    shape = (4,) * dims
    size = math.prod(shape)
    assert len(boxes_of_range(shape, 1, size - 1)) == 2 * dims - 1


@given(shapes, st.integers(1, 40), st.data())
def test_slabs_are_the_box_end_to_end_and_no_larger_than_asked_for(
    shape: tuple[int, ...], most: int, data: DataObject
) -> None:
    bounds = [part(data, size) for size in shape]
    box = Box(tuple(start for start, _ in bounds), tuple(stop - start for start, stop in bounds))
    slabs = list(box.slabs(most))
    tensor = numbers(shape)
    assert end_to_end(slabs, tensor) == end_to_end([box], tensor)
    assert all(slab.numel <= most for slab in slabs)
    # No crumbs: but for the last ones of each row, slabs are at least half of what they may be.
    assert len(slabs) <= 2 * math.ceil(box.numel / most) * max(1, len(shape)) + 1


@given(shapes, st.data())
def test_common_is_what_is_in_both(shape: tuple[int, ...], data: DataObject) -> None:
    def draw() -> Box:
        bounds = [part(data, size) for size in shape]
        return Box(tuple(start for start, _ in bounds), tuple(stop - start for start, stop in bounds))

    one, other, tensor = draw(), draw(), numbers(shape)
    both = {*end_to_end([one], tensor)} & {*end_to_end([other], tensor)}
    common = one.common(other)
    assert common == other.common(one)
    assert {*end_to_end([common] if common else [], tensor)} == both
    if common:
        for outer in (one, other):  # found again within what one has of the tensor
            assert torch.equal(common.of(outer.of(tensor), outer), common.of(tensor))


@given(shapes, st.data())
def test_a_range_of_memory_of_a_tensor_with_permuted_strides(shape: tuple[int, ...], data: DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))), "order")
    tensor = numbers(tuple(shape[dim] for dim in order)).permute([order.index(dim) for dim in range(len(shape))])
    assert tensor.shape == shape
    start, stop = part(data, tensor.numel())
    memory = torch.arange(tensor.numel())[start:stop].clone()
    parts = ranged(shape, tensor.stride(), start, memory)
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    for box, values in parts:
        assert torch.equal(values, box.of(tensor))
        values.fill_(-1)
    assert (memory == -1).all(), "the values are views, and none is left out"


@given(shapes, st.data())
def test_memory_order_makes_any_dense_tensor_row_major(shape: tuple[int, ...], data: DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))), "order")
    dense = torch.empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    assert dense.permute(memory_order(dense.shape, dense.stride())).is_contiguous()


def test_channels_last() -> None:
    tensor = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    assert memory_order(tensor.shape, tensor.stride()) == (0, 2, 3, 1)


def test_a_scalar_is_one_box_of_no_dimensions() -> None:
    assert boxes_of_range((), 0, 1) == [Box((), ())]
    assert boxes_of_range((), 0, 0) == []
    assert list(Box((), ()).slabs(1)) == [Box((), ())]
    assert Box((), ()).common(Box((), ())) == Box((), ())
