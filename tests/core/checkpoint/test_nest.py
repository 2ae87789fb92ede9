"""Nested dictionaries and lists: tensors are taken out and put in again, and all else stays what it is."""

from __future__ import annotations

from collections import Counter, OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_accel.core.checkpoint import Shard
from lightning_accel.core.checkpoint.nest import mapped, put_tensors, take_tensors

LARGE = 20_000
tensors = st.sampled_from([(LARGE,), (2, 3), (), (0, 5)]).map(torch.zeros)
leaves = st.one_of(tensors, st.integers(), st.none(), st.text(max_size=3), st.just(Shard.whole(torch.ones(2))))
nests = st.dictionaries(
    st.one_of(st.text(max_size=3), st.integers(0, 3)),
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 3)), inner, max_size=3),
        ),
        max_leaves=12,
    ),
    max_size=4,
)


def same(one: Any, other: Any) -> bool:
    """Shards are the same objects; ordinary tensors may have become shards of their memory."""
    if isinstance(other, Tensor):
        return one is other or (isinstance(one, Tensor) and one.shape == other.shape)
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(nests)
def test_what_is_taken_out_is_put_back(nest: dict[Any, Any]) -> None:
    found, rest = take_tensors(nest)
    assert all(isinstance(shard, Shard) for shard in found.values())
    # A path may end in what is no dictionary any more only where a dictionary was.
    assert same(put_tensors(rest, found), nest)


def test_which_tensors_are_taken() -> None:
    shard = Shard.whole(torch.ones(2))
    nest = {
        "with parts": {"part": shard, "buffer": torch.ones(3), "count": torch.tensor(1)},
        "without": {"small": torch.ones(3), "large": torch.ones(LARGE)},
        "list": [torch.ones(3), torch.ones(LARGE), shard],
        1: shard,
    }
    found, rest = take_tensors(nest)
    assert {*found} == {
        ("with parts", "part"),
        ("with parts", "buffer"),
        ("without", "large"),
        ("list", 1),
        ("list", 2),
        (1,),
    }
    assert found["with parts", "part"] is found["list", 2] is found[1,] is shard
    assert list(rest["with parts"]) == ["count"]
    assert rest["list"][1:] == [None, None]
    assert 1 not in rest
    assert nest["list"][2] is shard, "what was given is not changed"


def test_one_memory_is_one_tensor_and_others_are_not() -> None:
    whole = torch.zeros(LARGE * 2)
    nest = {"a": whole, "b": whole.detach(), "c": whole.view(2, -1), "d": whole[:LARGE], "e": whole[LARGE:]}
    found, _ = take_tensors(nest)
    assert found["a",] is found["b",]
    assert len({id(shard) for shard in found.values()}) == 4


def test_ranks_that_do_not_keep_whole_tensors_have_no_part_of_them() -> None:
    part = Shard.whole(torch.ones(2))
    found, _ = take_tensors({"whole": torch.ones(LARGE), "part": part}, keeps_whole=False)
    assert found["whole",].shape == (LARGE,)
    assert found["whole",].parts == {}
    assert found["part",].parts != {}


class Pair(NamedTuple):
    a: Any
    b: Any


class Attributes(dict):  # as Lightning's and others'
    def __getattr__(self, name: str) -> Any:
        return self[name]


def test_users_own_collections_stay_what_they_are() -> None:
    nest = {
        "counter": Counter("aab"),
        "ordered": OrderedDict(a=1),
        "attributes": Attributes(a=[1, Attributes(b=2)]),
        "mapping": UserDict(a=1),
        "pair": Pair(1, torch.ones(LARGE)),
        "tuples": {("a", 1): torch.ones(LARGE)},
        "set": {1, 2},
    }
    found, rest = take_tensors(nest)
    assert found == {}
    assert rest is nest
    found, rest = take_tensors({"attributes": Attributes(a=torch.ones(LARGE), b=1), "counter": nest["counter"]})
    assert rest == {"attributes": {"b": 1}, "counter": nest["counter"]}
    assert rest["counter"] is nest["counter"]
    assert [*found] == [("attributes", "a")]


class Subclass(Tensor):
    pass


def test_tensors_of_other_classes_stay_with_the_objects() -> None:
    nest = {"own": torch.ones(LARGE).as_subclass(Subclass), "meta": torch.ones(LARGE, device="meta")}
    assert take_tensors(nest) == ({}, nest)


def test_mapped_changes_tensors_and_keeps_what_is_one() -> None:
    tensor, own = torch.ones(2), Attributes(a=torch.ones(2))
    nest = {"a": [tensor, (tensor, 1)], "own": own, "pair": Pair(1, 2)}
    found = mapped(nest, lambda value: value + 1)
    assert torch.equal(found["a"][0], torch.full((2,), 2.0))
    assert found["a"][0] is found["a"][1][0]
    assert found["a"][1][1] == 1
    assert found["own"] is own
    assert found["pair"] is nest["pair"]
    assert nest["a"][0] is tensor


@pytest.mark.parametrize("nest", [None, {}, {"a": None}, {"a": {}}])
def test_dictionaries_are_made_where_there_is_nothing(nest: Any) -> None:
    """As of another rank's state, of which this one has nothing."""
    assert put_tensors(nest, {("a", "b"): 1, ("a", "c", 0): 2}) == {"a": {"b": 1, "c": {0: 2}}}
