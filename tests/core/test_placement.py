from dataclasses import replace

import pytest

from lightning_accel.core.placement import ROWS, Rest, find_row


def test_rows_are_what_the_table_says():
    table = {
        name: (r.parameters, r.computing, r.accumulating, r.gradients, r.optimizer_state) for name, r in ROWS.items()
    }
    rep, sha = Rest.REPLICATED, Rest.SHARDED
    assert table == {
        "ddp": (rep, rep, rep, rep, rep),
        "zero1": (rep, rep, rep, sha, sha),
        "zero2": (rep, rep, sha, sha, sha),
        "zero3": (sha, sha, sha, sha, sha),
        "fsdp": (sha, sha, sha, sha, sha),
        "fsdp_partial": (sha, rep, sha, sha, sha),
        "fsdp_hybrid": (sha, sha, sha, sha, sha),
    }
    assert [name for name, row in ROWS.items() if row.hybrid] == ["fsdp_hybrid"]


def test_wire_bytes_are_those_of_theory():
    # 2 psi (N-1)/N for one micro-batch under every row but full shard; zero2 reduces in every backward.
    for name, row in ROWS.items():
        assert row.wire_bytes(1000, ranks=4) == (3 if name in ("fsdp", "zero3", "fsdp_hybrid") else 2) * 1000 * 3 / 4
    assert ROWS["ddp"].wire_bytes(1000, 4, backwards=3) == 1500
    assert ROWS["zero1"].wire_bytes(1000, 4, backwards=3) == 1500
    assert ROWS["zero2"].wire_bytes(1000, 4, backwards=3) == 4 * 1000 * 3 / 4
    assert ROWS["fsdp"].wire_bytes(1000, 4, backwards=3) == 9 * 1000 * 3 / 4
    assert ROWS["fsdp_partial"].wire_bytes(1000, 4, backwards=3) == 6 * 1000 * 3 / 4
    # Three copies: a quarter of the gradients is all-reduced over them, once.
    across = 2 * (1000 / 4) * 2 / 3
    assert ROWS["fsdp_hybrid"].wire_bytes(1000, 4, backwards=3, copies=3) == 9 * 1000 * 3 / 4 + across
    # Accumulating on each rank: a gather for the window, another for the last backward, one reduction.
    local = replace(ROWS["fsdp"], accumulating=Rest.REPLICATED)
    assert local.wire_bytes(1000, 4, backwards=3) == 3 * 1000 * 3 / 4
    assert replace(ROWS["fsdp_partial"], accumulating=Rest.REPLICATED).wire_bytes(1000, 4, 3) == 2 * 1000 * 3 / 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", {"parameters": 400, "gradients": 400, "optimizer_state": 800}),
        ("zero1", {"parameters": 400, "gradients": 400, "optimizer_state": 200}),
        ("zero2", {"parameters": 400, "gradients": 100, "optimizer_state": 200}),
        ("fsdp", {"parameters": 100, "gradients": 100, "optimizer_state": 200}),
    ],
)
def test_rest_bytes_are_those_of_theory(name, expected):
    assert ROWS[name].rest_bytes(400, ranks=4) == expected


def test_an_unknown_row_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match="one of the placement rows ddp, zero1, zero2, zero3, fsdp, fsdp_partial, fsdp_hybrid, got 'zero9'",
    ):
        find_row("zero9")


def test_a_row_that_updates_shards_from_whole_gradients_is_no_row():
    with pytest.raises(AssertionError, match="a shard updates a shard"):
        replace(ROWS["ddp"], optimizer_state=Rest.SHARDED)
