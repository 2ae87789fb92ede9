import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel.core.xla.shardings import SHARD, batched, elements_on_one, replicated, sharded


@pytest.mark.parametrize(
    ("shape", "parts", "spec"),
    [
        ((), 4, ()),
        ((1,), 4, (None,)),
        ((3,), 4, ("shard",)),  # one element each on three devices, none on the fourth
        ((8,), 4, ("shard",)),
        ((8, 8), 4, ("shard", None)),
        ((7, 8), 4, (None, "shard")),  # 7 x 2 elements, not 2 x 8
        ((123, 30), 4, ("shard", None)),  # 31/123 of it, not 8/30
        ((30, 7), 4, ("shard", None)),
        ((1, 1, 6), 2, (None, None, "shard")),
        ((0, 4), 4, (None, "shard")),
        ((5, 5), 1, (None, None)),
    ],
)
def test_the_dimension_that_leaves_least_is_cut(
    shape: tuple[int, ...], parts: int, spec: tuple[str | None, ...]
) -> None:
    assert sharded(shape, parts) == spec


@given(st.lists(st.integers(0, 40), max_size=4), st.integers(1, 9))
def test_no_other_cut_along_one_dimension_leaves_less(shape: list[int], parts: int) -> None:
    def kept(dimension: int) -> int:
        return elements_on_one(shape, tuple(SHARD if d == dimension else None for d in range(len(shape))), parts)

    spec = sharded(shape, parts)
    assert spec.count(SHARD) <= 1
    least = min([elements_on_one(shape, replicated(shape), parts), *map(kept, range(len(shape)))])
    assert elements_on_one(shape, spec, parts) == least


@given(st.lists(st.integers(1, 40), max_size=4), st.integers(1, 9))
def test_all_devices_together_have_room_for_all_of_it(shape: list[int], parts: int) -> None:
    spec = sharded(shape, parts)
    pieces = parts if SHARD in spec else 1
    assert pieces * elements_on_one(shape, spec, parts) >= elements_on_one(shape, replicated(shape), parts)


def test_a_batch_is_cut_over_both_axes() -> None:
    assert batched((8, 3, 3)) == (("replicate", "shard"), None, None)
    assert batched(()) == ()
