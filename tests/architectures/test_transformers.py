"""GPT-2, Llama and BERT of Hugging Face's transformers, with random weights: trained, and GPT-2 writing text."""

import pytest
import torch
import torch.distributed as dist
import zoo
from lit import check_fit, fit, loader, write

from rows import everyday

MODELS = ["gpt2", "llama", "bert"]


def train(name: str, row: str) -> None:
    ours = zoo.with_engine(name, row)
    zoo.require_equal(ours, zoo.alone(name, dist.get_world_size()))
    if row == "fsdp":
        zoo.require_equal(ours, zoo.with_fsdp2(name))


@pytest.mark.parametrize(("name", "row"), zoo.grid(MODELS, everyday=("gpt2",)))
def test_training_gives_the_parameters_of_the_single_process_and_of_fsdp2(ranks2, name, row):
    ranks2.run(train, name, row)


@pytest.mark.parametrize(("name", "row"), zoo.grid(["gpt2"]))
def test_the_trainer_does_too(ranks2, name, row):
    ranks2.run(check_fit, name, row)


# ------------------------------------------------------------------ generation


def single_process_writes(batches: list[int], rank: int) -> list[torch.Tensor]:
    """What the trained model of the single process writes for a rank's prompts."""
    trained = zoo.alone("gpt2", dist.get_world_size())
    model = zoo.build(zoo.gpt2)
    model.load_state_dict(trained.parameters | trained.buffers, strict=False)
    return [write(model, zoo.tokens(number, rank), number) for number in batches]


def require_same_text(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == theirs.tolist()


def generate_between_steps(row: str) -> None:
    case = zoo.CASES["gpt2"]
    engine, optimizer = zoo.set_up(zoo.build(case.make), row)
    zoo.run_engine(engine, optimizer, case)
    rank = dist.get_rank()
    with engine.full_parameters():
        text = [write(engine.module, zoo.tokens(number, rank), number) for number in range(3)]
        total = sum(parameter.sum() for parameter in engine.module.parameters())
    engine.close()
    require_same_text(text, single_process_writes([0, 1, 2], rank))
    # `generate` runs forward many times without gradients: none of them may take the values away.
    assert total == sum(parameter.sum() for parameter in engine.module.parameters())
    assert len({tuple(row) for row in text[2].tolist()}) > 1, "the same text for all prompts shows nothing"


@pytest.mark.parametrize("row", everyday(["zero2", "fsdp", "fsdp_partial"]))
def test_generate_within_full_parameters(ranks2, row):
    ranks2.run(generate_between_steps, row)


def generate_in_predict_step(row: str) -> None:
    trainer, module = fit("gpt2", row)
    rank = dist.get_rank()
    text = trainer.predict(module, loader("gpt2", 1 + 2 * rank))
    require_same_text(text, single_process_writes(list(range(1 + 2 * rank)), rank))


@pytest.mark.parametrize("row", everyday(["fsdp", "fsdp_partial"]))
def test_predict_step_generates_for_other_numbers_of_prompts_on_each_rank(ranks2, row):
    ranks2.run(generate_in_predict_step, row)


def validate_unevenly(row: str) -> None:
    trainer, module = fit("gpt2", row)
    rank = dist.get_rank()
    count = 4 - 3 * rank
    (found,) = trainer.validate(module, loader("gpt2", count), verbose=False)
    model = zoo.build(zoo.gpt2)
    model.load_state_dict(zoo.alone("gpt2", dist.get_world_size()).parameters, strict=False)
    losses = [zoo.next_token(model, zoo.tokens(number, rank)).item() for number in range(count)]
    # The Trainer keeps its metrics in float32.
    assert found["val_loss"] == pytest.approx(sum(losses) / count, rel=1e-6)


@pytest.mark.parametrize("row", everyday(["fsdp", "fsdp_partial"]))
def test_ranks_may_validate_different_numbers_of_batches(ranks2, row):
    ranks2.run(validate_unevenly, row)
