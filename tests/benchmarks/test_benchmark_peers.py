"""That every peer trains what a single process trains, in each precision, with micro-batches and on odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.config import Config, Precision
from benchmarks.peers import PEERS, QUICK_PEERS, Spec
from benchmarks.result import PeerResult
from benchmarks.runner import Runner

PARAMETERS = 134_912  # of gpt-tiny
WITH_LINES_OF_THEIR_OWN = [
    name for name, spec in PEERS.items() if spec.family in ("torch", "accelerate", "deepspeed") and not spec.impossible
]
# Of Trainer and Fabric, whose adapters are one each: a strategy of Lightning's and one of ours.
OF_LIGHTNING = ["trainer_model_parallel", "trainer_accel_fsdp", "fabric_model_parallel", "fabric_accel_zero2"]


def _run(name: str, **changes: Any) -> PeerResult:
    for module in PEERS[name].requires:
        pytest.importorskip(module, reason=f"{name} needs {module}", exc_type=ImportError)
    config = Config(model="gpt-tiny", rounds=1, steps=2)
    config = Config(**config.public() | changes)
    with Runner(config, [PEERS[name]], name, lambda *_: None, limit=200) as runner:
        (result,) = runner.run()
    assert result.status == "valid", result.story or result.check
    assert result.unsaved is None, result.story or result.load_check
    assert min(result.save_seconds + result.load_seconds) > 0
    return result


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        # In fp32 the suite's other tests run torch's; here others are run in both.
        *((name, "bf16-mixed") for name in WITH_LINES_OF_THEIR_OWN + OF_LIGHTNING),
        *((name, "32-true") for name in WITH_LINES_OF_THEIR_OWN if PEERS[name].family != "torch"),
    ],
)
def test_a_peer_trains_what_a_single_process_trains(name: str, precision: Precision) -> None:
    result = _run(name, precision=precision, accumulate=2)
    assert all(sent > PARAMETERS for sent in result.wire)  # no rank trains alone
    assert len(result.start_seconds) == 2


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("trainer_accel_ds3", "32-true"),
        ("fabric_accel_ds1", "bf16-mixed"),
        ("fabric_accel_json2", "32-true"),
    ],
)
def test_deepspeeds_file_behind_lightning(name: str, precision: Precision) -> None:
    assert all(sent > PARAMETERS for sent in _run(name, precision=precision, accumulate=2).wire)


@pytest.mark.matrix
@pytest.mark.parametrize("model", ["mlp", "resnet"])
@pytest.mark.parametrize("name", ["torch_fsdp2", "accelerate_ddp", "deepspeed_zero1", "deepspeed_zero3"])
def test_a_peer_trains_odd_sizes_and_images(name: str, model: str) -> None:
    _run(name, model=model, recompute=True)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "accelerate_deepspeed"])
def test_deepspeed_keeps_a_second_copy_of_its_part_of_the_parameters(name: str) -> None:
    (rank, _) = _run(name).at_rest
    whole, half = 4 * PARAMETERS, 2 * PARAMETERS
    # Stage 3 keeps only the parts of the matrices, what is small is whole; everywhere there is the fp32 copy of a part.
    assert rank["parameters"] >= (half if name.endswith("3") else whole) + half
    assert half <= rank["gradients"] <= whole
    assert 0 <= rank["optimizer"] - 2 * half < 4096


@pytest.mark.matrix
def test_copies_of_the_model_state_need_four_ranks() -> None:
    result = _run("accel_fsdp_hybrid", ranks=4)
    assert all(rank["parameters"] == 2 * PARAMETERS for rank in result.at_rest[:1])


def test_a_peer_that_cannot_run_says_why() -> None:
    config = Config(ranks=2)
    assert PEERS["torch_ddp"].obstacle(config) is None
    assert PEERS["accel_fsdp_hybrid"].obstacle(config) == "needs 4 ranks or a multiple of that, not 2"
    assert PEERS["accel_fsdp_hybrid"].obstacle(Config(ranks=8)) is None
    assert "only supported on CUDA GPUs" in str(PEERS["trainer_deepspeed"].obstacle(config))
    assert "does not look at its FSDP plugin on CPU" in str(PEERS["accelerate_fsdp2"].obstacle(config))
    absent = Spec(name="a", adapter=".single:Single", family="torch", about="", requires=("no_such_package",))
    assert absent.obstacle(config) == "no_such_package is not installed"


def test_every_peer_has_an_adapter_of_its_own_file() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "peers"
    for spec in PEERS.values():
        module, name = spec.adapter.removeprefix(".").split(":")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()
    assert set(QUICK_PEERS) < set(PEERS)
