"""Engines into and out of checkpoints: every kind of parameter, what is read of the files, and what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from core.checkpoint.engines import (
    Odd,
    OddParameters,
    Optimizers,
    Read,
    differences,
    load,
    make_engine,
    save,
    snapshot,
    train,
    watched,
)
from core.toys import Net
from harness import Ranks
from lightning_accel.core import Engine
from lightning_accel.core.checkpoint import Reader, StoredTensor
from lightning_accel.core.checkpoint import load as load_nest
from lightning_accel.core.checkpoint.boxes import Box
from lightning_accel.core.checkpoint.engine_state import load_model, model_shards, optimizer_shards, parameter_shards


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def adamw(module: nn.Module) -> Optimizers:
    return [torch.optim.AdamW(trained(module), 0.01)]


def adafactor(module: nn.Module) -> Optimizers:
    """Needs whole tensors: units have an owned layout."""
    return [torch.optim.Adafactor([p for p in trained(module) if p.numel()], 0.01)]  # torch divides by their number


def in_another_order(module: nn.Module) -> Optimizers:
    """Two groups, neither in the module's order; one parameter is in none."""
    backwards = trained(module)[::-1]
    groups = [
        {"params": backwards[1::2], "lr": 0.02, "weight_decay": 0.1, "own": "a"},
        {"params": backwards[2::2], "betas": (0.8, 0.99), "own": "b"},
    ]
    return [torch.optim.AdamW(groups, lr=0.01, amsgrad=True)]


def two_optimizers(module: nn.Module) -> Optimizers:
    parameters = trained(module)
    return [torch.optim.SGD(parameters[::2], 0.01, momentum=0.9), torch.optim.NAdam(parameters[1::2], 0.01)]


# ---------------------------------------------------------------- every kind of parameter


def write(row: str, make: Any, optimizers: Any, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    engine, made = make_engine(row, make, optimizers, **options)
    train(engine, made)
    save(engine, made, path)
    found = snapshot(engine, made)
    engine.close()
    return found


def read(row: str, make: Any, optimizers: Any, path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """What a model of other values, and an optimizer without state, have before and after they load."""
    engine, made = make_engine(row, make, optimizers, shift=3.0, **options)
    before = snapshot(engine, made)
    load(engine, made, path)
    after = snapshot(engine, made)
    train(engine, made, 1)  # what was loaded can be stepped with
    engine.close()
    return before, after


@pytest.mark.parametrize(
    ("optimizers", "before", "ranks", "after", "others"),
    [
        (in_another_order, "zero2", 2, "fsdp", 3),
        (two_optimizers, "fsdp", 3, "ddp", 2),
        (adafactor, "fsdp", 2, "zero1", 3),
        (adafactor, "ddp", 3, "fsdp_partial", 2),
    ],
)
def test_every_kind_of_parameter_from_one_layout_into_another(
    ranks_of: Callable[[int], Ranks],
    optimizers: Any,
    before: str,
    ranks: int,
    after: str,
    others: int,
    tmp_path: Path,
) -> None:
    expected, *same = ranks_of(ranks).run(write, before, Odd, optimizers, tmp_path / "it", {})
    assert all(differences(theirs, expected) == [] for theirs in same)
    for fresh, loaded in ranks_of(others).run(read, after, Odd, optimizers, tmp_path / "it", {}):
        assert differences(loaded, expected) == []
        changed = {line.split(":")[0] for line in differences(fresh["model"], expected["model"])}
        assert changed == {f".{name}" for name in expected["model"]} - {".empty"}, "nothing was loaded"


def test_16_bit_parameters_are_saved_in_the_dtype_that_they_came_with(
    ranks2: Ranks, ranks3: Ranks, tmp_path: Path
) -> None:
    options = {"dtype": torch.float32}
    low = {**options, "param_dtype": torch.bfloat16}
    expected = ranks2.run(write, "fsdp", Net, adamw, tmp_path / "it", low)[0]
    saved = load_nest(tmp_path / "it")["state_dict"]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert any((value != value.bfloat16()).any() for value in saved.values()), "rounded before they were saved"
    for _, loaded in ranks3.run(read, "zero2", Net, adamw, tmp_path / "it", low):
        assert differences(loaded, expected) == []
    for _, loaded in ranks3.run(read, "fsdp", Net, adamw, tmp_path / "it", options):
        assert differences(loaded, expected) == []


# ------------------------------------------------------------------- what is read


def load_watched(row: str, make: Any, optimizers: Any, path: Path) -> tuple[list[Read], int, dict[str, Tensor]]:
    """What this rank has read, how much of that the reader says, and what of each parameter it keeps."""
    engine, made = make_engine(row, make, optimizers, shift=3.0)
    with watched() as reads:
        reader = load(engine, made, path)
    parameters = engine.module.named_parameters(remove_duplicate=False)
    kept = {name: mask_of(engine, parameter) for name, parameter in parameters}
    engine.close()
    return reads, reader.bytes_read, kept


def mask_of(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """Which elements of a parameter this rank updates, or keeps if nobody updates it."""
    if parameter not in engine.places:
        return torch.ones(parameter.shape, dtype=torch.bool)
    unit, position = engine.places[parameter]
    slot, (start, stop) = unit.layout.slots[position], unit.part
    flat = torch.zeros(slot.numel, dtype=torch.bool)
    flat[max(start - slot.start, 0) : max(stop - slot.start, 0)] = True
    return flat.as_strided(parameter.shape, unit.memory.strides[position]).clone()


def chunks_of(path: Path) -> dict[Read, tuple[str, Box]]:
    """What lies in the files: the parameter (of the model or of its state) and the box; not what has no elements."""
    reader = Reader(path)
    found = {}
    for key, kind in reader.metadata.state_dict_metadata.items():
        assert isinstance(kind, TensorStorageMetadata)
        keys = (reader.metadata.planner_data or {})[key]
        name = keys[1] if keys[0] == "state_dict" else keys[3]  # optimizer_states, number, state, parameter, value
        for box in reader.boxes(key):
            info = reader.metadata.storage_data[MetadataIndex(key, box.offsets)]
            if box.numel:
                found[info.relative_path, info.offset, info.length] = name, box
    return found


@pytest.mark.parametrize(("row", "make", "optimizers"), [("fsdp", OddParameters, adamw), ("zero2", Net, adafactor)])
def test_the_same_layout_reads_each_byte_once_and_no_other_ranks_file(
    ranks3: Ranks, row: str, make: Any, optimizers: Any, tmp_path: Path
) -> None:
    ranks3.run(write, row, make, optimizers, tmp_path / "it", {})
    chunks = chunks_of(tmp_path / "it")
    for rank, (reads, counted, _) in enumerate(ranks3.run(load_watched, row, make, optimizers, tmp_path / "it")):
        mine = {chunk for chunk in chunks if chunk[0].startswith(f"__{rank}_")}
        assert Counter(reads) == Counter(mine)
        assert counted == sum(length for _, _, length in mine) > 0


@pytest.mark.parametrize(("row", "world"), [("fsdp", 3), ("zero2", 3), ("ddp", 2)])
def test_another_layout_reads_the_chunks_that_overlap_only(
    ranks_of: Callable[[int], Ranks], row: str, world: int, tmp_path: Path
) -> None:
    ranks_of(2).run(write, "fsdp", OddParameters, adamw, tmp_path / "it", {})
    chunks = chunks_of(tmp_path / "it")
    assert len(chunks) > 40, "too few for a difference"
    for reads, counted, kept in ranks_of(world).run(load_watched, row, OddParameters, adamw, tmp_path / "it"):
        wanted = {chunk for chunk, (name, box) in chunks.items() if box.of(kept[name]).any()}
        assert Counter(reads) == Counter(wanted)
        assert counted == sum(length for _, _, length in wanted)
        # Of a model's ddp copy all of it; else about what is kept: chunks at its edges are more.
        assert len(wanted) == len(chunks) if row == "ddp" else len(wanted) < 0.75 * len(chunks)


def describe_shards(row: str, make: Any, optimizers: Any) -> Any:
    """For each parameter and each value of its state: its shape, and how many elements this rank has of it."""
    engine, made = make_engine(row, make, optimizers)
    train(engine, made)
    (state,) = [optimizer_shards(engine.find_optimizer(optimizer)) for optimizer in made]
    model = model_shards(engine)
    described = {
        name: (tuple(value.shape), sum(box.numel for box, _ in value.parts.values())) for name, value in model.items()
    }
    moments = {
        name: sum(box.numel for box, _ in entry["exp_avg"].parts.values())
        for name, entry in state["state"].items()
        if "exp_avg" in entry and entry["exp_avg"].dim()
    }
    ones = parameter_shards({unit: torch.ones_like(unit.memory.mine) for unit in engine.units})
    summed = {engine.names[p]: sum(int(part.sum()) for _, part in value.parts.values()) for p, value in ones.items()}
    tied = model["tied.weight"] is model["second.weight"]
    names = [group["params"] for group in state["param_groups"]]
    engine.close()
    return described, moments, summed, tied, names


def test_ranks_divide_what_rests_in_parts(ranks3: Ranks) -> None:
    everyone = ranks3.run(describe_shards, "fsdp", OddParameters, adamw)
    module = OddParameters()
    for name, parameter in module.named_parameters():
        assert {found[0][name][0] for found in everyone} == {tuple(parameter.shape)}
        assert sum(found[0][name][1] for found in everyone) == parameter.numel()
        # Of what each value of the unit's memory is one of.
        assert sum(found[2].get(name, 0) for found in everyone) == parameter.numel()
        if parameter.requires_grad and parameter.dim() and parameter.numel() and name != "unused":
            assert sum(found[1].get(name, 0) for found in everyone) == parameter.numel()
    for _, moments, _, tied, names in everyone:
        assert tied
        assert names == [[name for name, parameter in module.named_parameters() if parameter.requires_grad]]
        assert "unused" not in moments


# ------------------------------------------------------------------- what does not fit


def spoil_names(state: dict[str, Any]) -> None:
    del state["first.bias"]
    state["more"] = torch.ones(2)
    state["conv.weight"] = torch.ones(5, 3, 2, 2)
    state["scale"] = torch.ones(2)


def refuse_model(row: str, path: Path) -> tuple[str, list[str], list[Read]]:
    """The error, what is another than before, and what was read."""
    engine, made = make_engine(row, Odd, adamw, shift=3.0)
    before = snapshot(engine, made)
    state = load_nest(path)["state_dict"]
    spoil_names(state)
    with watched() as reads, pytest.raises(RuntimeError) as caught:
        load_model(engine.module, state, engine=engine)
    changed = differences(snapshot(engine, made), before)
    train(engine, made, 1)  # all ranks can go on
    # Without strictness names do not matter, but shapes do.
    with pytest.raises(RuntimeError, match="size mismatch for conv.weight") as caught_again:
        load_model(engine.module, state, engine=engine, strict=False)
    assert "Missing" not in str(caught_again.value)
    del state["conv.weight"], state["scale"]
    missing, unexpected = load_model(engine.module, state, engine=engine, strict=False)
    assert (set(missing), unexpected) == ({"first.bias", "conv.weight", "scale"}, ["more"])
    engine.close()
    return str(caught.value), changed, reads


@pytest.mark.parametrize("row", ["fsdp", "zero2"])
def test_a_model_that_does_not_fit_is_not_changed(ranks3: Ranks, row: str, tmp_path: Path) -> None:
    ranks3.run(write, "fsdp", Odd, adamw, tmp_path / "it", {})
    buffers = {read for read, (name, _) in chunks_of(tmp_path / "it").items() if name == "table"}
    for message, changed, reads in ranks3.run(refuse_model, row, tmp_path / "it"):
        assert changed == []
        assert set(reads) <= buffers, "parameters were read before it was known whether they fit"
        for expected in ("Missing key", "first.bias", "Unexpected key", '"more"', "for conv.weight", "for scale"):
            assert expected in message


def spoil_state(kind: str, state: dict[str, Any]) -> None:
    if kind == "shapes":
        state["state"]["first.weight"]["exp_avg"] = torch.ones(3, 3)
        state["state"]["conv.weight"]["exp_avg_sq"] = torch.ones(4)
    elif kind == "names":
        names = state["param_groups"][0]["params"]
        names[names.index("first.bias")] = "other.bias"
        names.remove("scale")
    else:
        names = state["param_groups"][0]["params"]
        state["param_groups"] = [{**state["param_groups"][0], "params": p} for p in (names[:2], names[2:])]


def refuse_state(row: str, kind: str, path: Path) -> tuple[str, list[str]]:
    engine, made = make_engine(row, OddParameters, adamw, shift=3.0)
    train(engine, made)
    before = snapshot(engine, made)
    state = load_nest(path)["optimizer_states"][0]
    state["param_groups"][0]["lr"] = 7.0
    spoil_state(kind, state)
    with pytest.raises(ValueError, match="Expected a state that fits this AdamW") as caught:
        made[0].load_state_dict(state)
    changed = differences(snapshot(engine, made), before)
    train(engine, made, 1)
    engine.close()
    return str(caught.value), changed


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("shapes", ["first.weight: 'exp_avg' has shape (3, 3), expected (8, 7)", "conv.weight: 'exp_avg_sq'"]),
        ("names", ["group 0: missing: first.bias, scale", "group 0: unexpected: other.bias"]),
        ("groups", ["parameter groups: expected 1, got 2", "group 1: unexpected: "]),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    ranks2: Ranks, kind: str, expected: list[str], tmp_path: Path
) -> None:
    ranks2.run(write, "zero2", OddParameters, adamw, tmp_path / "it", {})
    for row in ("fsdp", "ddp"):
        for message, changed in ranks2.run(refuse_state, row, kind, tmp_path / "it"):
            assert changed == []
            assert all(line in message for line in expected), message


class Counting(nn.Module):
    """Has state that is no tensor."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.count = count

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        assert self.weight.sum() == 3, "values come first, and are there"
        self.count = state


def test_extra_state_waits_until_all_fits() -> None:
    module = Counting(1)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        load_model(module, {"weight": torch.ones(2), "_extra_state": 5})
    assert module.count == 1
    load_model(module, {"weight": torch.ones(3), "_extra_state": 5})
    assert module.count == 5
    assert "set_extra_state" not in vars(module)


# --------------------------------------------------------------------------------- damage


def load_damaged(row: str, folder: Path, what: str) -> tuple[str, dict[str, Any]]:
    """The error, and what there is when a good checkpoint was loaded after it."""
    engine, made = make_engine(row, Net, adamw, shift=3.0)
    nest = load_nest(folder / "bad")
    with pytest.raises(ValueError, match="damaged") as caught:
        {
            "model": lambda: load_model(engine.module, nest["state_dict"], engine=engine),
            "optimizer": lambda: made[0].load_state_dict(nest["optimizer_states"][0]),
        }[what]()
    load(engine, made, folder / "good")
    found = snapshot(engine, made)
    train(engine, made, 1)
    engine.close()
    return str(caught.value), found


@pytest.mark.parametrize("row", ["zero2", "fsdp"])
@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_damage_that_one_rank_finds_is_an_error_on_all_and_they_can_take_another(
    ranks2: Ranks, what: str, row: str, tmp_path: Path
) -> None:
    expected = ranks2.run(write, row, Net, adamw, tmp_path / "good", {})[0]
    ranks2.run(write, row, Net, adamw, tmp_path / "bad", {})
    file = tmp_path / "bad/__1_0.distcp"
    content = bytearray(file.read_bytes())
    for name, offset, length in chunks_of(tmp_path / "bad"):
        if name == file.name:
            content[offset + length // 2] ^= 1
    file.write_bytes(content)
    (first, found), (second, same) = ranks2.run(load_damaged, row, tmp_path, what)
    assert first.startswith("rank 1 has failed in loading ")
    assert "__1_0.distcp" in first
    assert "__1_0.distcp" in second
    assert "rank 1 has failed" not in second
    assert differences(found, expected) == differences(same, expected) == []


def test_what_a_hook_has_kept_is_loaded_as_it_is(ranks2: Ranks, tmp_path: Path) -> None:
    """Values may be tensors in memory beside those of the directory."""
    ranks2.run(write, "fsdp", Net, adamw, tmp_path / "it", {})
    for found in ranks2.run(load_mixed, tmp_path / "it"):
        assert torch.equal(found["first.weight"], torch.full((13, 7), 2.5, dtype=torch.float64))
        assert torch.equal(found["last.weight"], load_nest(tmp_path / "it")["state_dict"]["last.weight"].full())


def load_mixed(path: Path) -> dict[str, Tensor]:
    engine, made = make_engine("fsdp", Net, adamw)
    state = load_nest(path)["state_dict"]
    state["first.weight"] = torch.full((13, 7), 2.5)
    assert isinstance(state["last.weight"], StoredTensor)
    load_model(engine.module, state, engine=engine)
    found: dict[str, Tensor] = snapshot(engine, made)["model"]
    engine.close()
    return found


SCALARS = {
    "count": torch.tensor(2**60 + 1),
    "scale": torch.tensor(0.1, dtype=torch.bfloat16),
    "nothing": torch.tensor(float("nan"), dtype=torch.float64),
    "on": torch.tensor(True),
    "root": torch.tensor(1 - 2j),
    "word": "as it is",
}


def state_with_scalars() -> dict[str, Any]:
    engine, made = make_engine("fsdp", Net, adamw)
    train(engine, made)
    (added,) = engine.optimizers
    for segment in added.segments:
        added.optimizer.state[segment.tensor].update(SCALARS)
    state: dict[str, Any] = optimizer_shards(added)["state"]
    engine.close()
    return {name: {key: values.get(key) for key in SCALARS} for name, values in state.items()}


def test_numbers_of_other_ranks_keep_their_dtype_and_every_bit(ranks2: Ranks) -> None:
    for state in ranks2.run(state_with_scalars):
        assert len(state) == len(list(Net().parameters()))
        for name, found in state.items():
            assert differences(found, SCALARS) == [], name
