"""Models of torch's own layers: a ResNet with BatchNorm, recurrent layers, two towers, a mixture of experts.

BatchNorm is compared as torch's DDP defines it: each rank normalises by its own samples, and the first rank's running
statistics are everyone's.
"""

import pytest
import torch.distributed as dist
import zoo
from lit import check_fit

MODELS = ["resnet", "recurrent", "two_towers", "experts"]


def train(name: str, row: str) -> None:
    ours = zoo.with_engine(name, row)
    zoo.require_equal(ours, zoo.alone(name, dist.get_world_size()))
    if row == "fsdp":
        # FSDP2 leaves each rank the running statistics of its own samples.
        zoo.require_equal(ours, zoo.with_fsdp2(name), buffers=dist.get_rank() == 0)


@pytest.mark.parametrize(("name", "row"), zoo.grid(MODELS, everyday=("two_towers", "experts")))
def test_training_gives_the_parameters_of_the_single_process_and_of_fsdp2(ranks2, name, row):
    ranks2.run(train, name, row)


@pytest.fixture(scope="module")
def ranks4(ranks_of):
    return ranks_of(4)


def train_in_copies(name: str) -> None:
    ours = zoo.with_engine(name, "fsdp_hybrid", shard_size=2)
    zoo.require_equal(ours, zoo.alone(name, dist.get_world_size()))
    zoo.require_equal(ours, zoo.with_fsdp2(name, 2))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["two_towers", "experts"])
def test_what_ranks_use_unevenly_in_two_copies(ranks4, name):
    ranks4.run(train_in_copies, name)


@pytest.mark.parametrize(("name", "row"), zoo.grid(["resnet", "two_towers"]))
def test_the_trainer_does_too(ranks2, name, row):
    ranks2.run(check_fit, name, row)


def used(name: str, ranks: int) -> list[tuple[set[str], ...]]:
    """For each micro-batch, the parameters that each rank's samples give a gradient."""
    case = zoo.CASES[name]
    module = zoo.build(case.make)
    found = []
    for number in range(zoo.STEPS * zoo.ACCUMULATE):
        sets = []
        for rank in range(ranks):
            module.zero_grad()
            case.loss(module, case.batch(number, rank)).backward()
            sets.append({key for key, parameter in module.named_parameters() if parameter.grad is not None})
        found.append(tuple(sets))
    return found


@pytest.mark.parametrize("name", ["two_towers", "experts"])
def test_the_ranks_use_these_models_unevenly(name):
    """What the comparisons above stand on."""
    everything = {key for key, _ in zoo.build(zoo.CASES[name].make).named_parameters()}
    batches = used(name, 2)
    assert any(first - second and second - first for first, second in batches), "each rank uses what the other does not"
    assert any(first | second < everything for first, second in batches), "some is used by none"
