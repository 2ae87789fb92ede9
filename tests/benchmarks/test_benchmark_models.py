"""That every model learns, in every setting that the axes offer, and that recomputing changes nothing but memory."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from benchmarks.axes import configs, slug
from benchmarks.cli import _parser, main
from benchmarks.config import Config
from benchmarks.models import MODELS, Batches, build_model, build_optimizer, units_per_step

SMALL = ("gpt-tiny", "mlp", "resnet")


def _losses(config: Config, steps: int) -> list[float]:
    module, batches = build_model(config), Batches(config)
    optimizer = build_optimizer(module.parameters(), config)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = module(*batches.of_rank(step)[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("model", SMALL)
def test_recomputed_activations_give_the_same_losses(model: str) -> None:
    plain = _losses(Config(model=model), 8)
    assert sum(plain[4:]) < sum(plain[:4])
    assert _losses(Config(model=model, recompute=True), 8) == plain


@pytest.mark.parametrize("model", SMALL)
def test_recomputing_keeps_fewer_activations(model: str) -> None:
    kept = {}
    for recompute in (False, True):
        config = Config(model=model, recompute=recompute)
        module, (batch, *_) = build_model(config), Batches(config).of_rank(0)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = module(*batch)
        assert loss.requires_grad
        kept[recompute] = sum(sizes.values())
    assert kept[True] < kept[False]


@pytest.mark.parametrize("model", MODELS)
def test_blocks_are_what_peers_shard(model: str) -> None:
    with torch.device("meta"):
        module = build_model(Config(model=model))
    assert len(list(islice(module.get_submodule("blocks").children(), 2))) == 2


def test_no_size_of_the_perceptron_divides_by_a_number_of_ranks() -> None:
    sizes = {size for parameter in build_model(Config(model="mlp")).parameters() for size in parameter.shape}
    assert all(size % ranks for size in sizes for ranks in (2, 3, 4))


def test_units_are_those_of_all_ranks_and_micro_batches() -> None:
    assert units_per_step(Config(model="gpt-tiny", ranks=3, accumulate=4)) == 3 * 4 * 2 * 32  # tokens
    assert units_per_step(Config(model="mlp", ranks=2)) == 2 * 17  # samples


def test_values_of_axes_multiply() -> None:
    arguments = "--model mlp,resnet --precision 32-true,bf16-mixed --ranks 2 --accumulate 1,4,4 --recompute off,on"
    options = _parser().parse_args(arguments.split())
    found = configs(options, rounds=1)
    assert len(found) == len(set(map(slug, found))) == 16
    assert slug(found[-1]) == "resnet-bf16-mixed-2ranks-4micro-recompute"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--quick --full", "not allowed with"),
        ("--memory --model mlp,resnet", "--memory records one combination of axes"),
        ("--precision 8-bit", "expected one of 32-true, bf16-mixed, got 8-bit"),
        ("--model ,", "expected at least one value"),
        ("--peers accel_fsdp_hybrid", "needs 4 ranks or a multiple of that, not 2"),
        ("--peers trainer_fsdp", "for GPUs only"),
        ("--peers single,torch_ddp --reference accel_ddp", "--reference accel_ddp is not among --peers"),
        ("--baseline nowhere.jsonl", "expected a file, found none at nowhere.jsonl"),
    ],
)
def test_contradictions_are_said_before_anything_is_tried(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
