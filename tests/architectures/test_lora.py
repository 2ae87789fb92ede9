"""peft's LoRA on models of transformers that rest sharded: what is frozen costs no gradient and no optimizer memory."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import zoo
from torch import nn

from rows import everyday

ROWS = ["fsdp", "fsdp_partial"]


def adapted() -> nn.Module:
    """GPT-2 with adapters. peft starts one side of each with zeros; `zoo.build` gives it values."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return peft.get_peft_model(zoo.gpt2(), config)


CASE = zoo.Case(adapted, zoo.tokens, zoo.next_token)


def build() -> Any:
    return zoo.build(CASE.make)


def start(row: str) -> tuple[Any, torch.optim.Optimizer]:
    return zoo.set_up(build(), row)


def alone() -> tuple[Any, list[float]]:
    """The single process."""
    model = build()
    return model, zoo.run_alone(model, CASE, dist.get_world_size())


def train(row: str) -> dict[str, Any]:
    """Compares training with the single process, and says what the engine holds."""
    engine, optimizer = start(row)
    norms = zoo.run_engine(engine, optimizer, CASE)
    report = engine.report()
    engine.close()
    expected, expected_norms = alone()
    zoo.require_equal(zoo.snapshot(engine.module, norms), zoo.snapshot(expected, expected_norms))
    before = dict(build().named_parameters())
    for name, parameter in engine.module.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same != parameter.requires_grad, f"{name}: trainable {parameter.requires_grad}, unchanged {same}"
    sizes = {flag: sum(p.nbytes for p in expected.parameters() if p.requires_grad is flag) for flag in (True, False)}
    return {"report": report, "trained": sizes[True], "frozen": sizes[False], "adapters": len(before)}


@pytest.mark.parametrize("row", everyday(["zero2", *ROWS]))
def test_only_adapters_have_gradients_and_optimizer_state(ranks2, row):
    results = ranks2.run(train, row)
    trained, frozen = results[0]["trained"], results[0]["frozen"]
    assert frozen > 3 * trained, "the frozen part must weigh, or its absence shows nothing"
    reports = [result["report"] for result in results]
    held = {kind: sum(report.at_rest[kind] for report in reports) for kind in reports[0].at_rest}
    padding = {kind: sum(report.padding[kind] for report in reports) for kind in reports[0].padding}
    # Over both ranks once each, to the byte: of what is trained, and of nothing else.
    assert held["gradients"] - padding["gradients"] == trained
    # Two moments of each adapter, and AdamW's step counters: four bytes for each of its tensors.
    assert 2 * trained <= held["optimizer_state"] <= 2 * (trained + padding["gradients"]) + 4 * results[0]["adapters"]
    if row == "zero2":
        assert held["frozen_parameters"] == 2 * frozen
    else:
        assert held["parameters"] - padding["parameters"] == trained
        assert frozen <= held["frozen_parameters"] <= 1.05 * frozen  # each rank has half of it, and padding


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=zoo.tokens(0, 0)).logits


def merge(row: str) -> None:
    engine, optimizer = start(row)
    zoo.run_engine(engine, optimizer, CASE)
    expected, _ = alone()
    plain = logits(build().get_base_model())  # before it is changed
    with engine.full_parameters():
        adapters = {name: value.clone() for name, value in peft.get_peft_model_state_dict(engine.module).items()}
    with engine.full_parameters(writeback=True):
        engine.module.merge_adapter()
        merged = logits(engine.module)
    with engine.forward_context():
        kept = logits(engine.module)
    with engine.full_parameters(writeback=True):
        engine.module.unmerge_adapter()
    with engine.forward_context():
        apart = logits(engine.module)
    right = logits(expected)
    for found in (merged, kept, apart):
        assert float((found - right).norm() / right.norm()) < zoo.TOLERANCE
    assert float((right - plain).norm() / right.norm()) > 1e-2, "adapters that do nothing show nothing"

    theirs = peft.get_peft_model_state_dict(expected)
    assert all("lora_" in name for name in adapters)
    error, where = zoo.worst(adapters, theirs)
    assert error < zoo.TOLERANCE, f"{where} differs by {error}"
    fresh = build()  # with other adapters, until these are loaded
    peft.set_peft_model_state_dict(fresh, adapters)
    assert float((logits(fresh) - right).norm() / right.norm()) < zoo.TOLERANCE

    engine.close()
    whole = engine.module.merge_and_unload()
    assert not any("lora_" in name for name, _ in whole.named_parameters())
    assert float((logits(whole) - right).norm() / right.norm()) < zoo.TOLERANCE


@pytest.mark.parametrize("row", everyday(ROWS))
def test_adapters_are_saved_merged_and_unloaded(ranks2, row):
    ranks2.run(merge, row)


def unload_within(row: str) -> None:
    engine, optimizer = start(row)
    zoo.run_engine(engine, optimizer, CASE)
    expected, _ = alone()
    right = logits(expected)
    with engine.full_parameters():
        # A copy that is merged and is nobody's: training goes on with the adapters.
        state = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
        copied = build()
        copied.load_state_dict(state)
        whole = copied.merge_and_unload()
    assert float((logits(whole) - right).norm() / right.norm()) < zoo.TOLERANCE
    zoo.run_engine(engine, optimizer, CASE)
    engine.close()


@pytest.mark.parametrize("row", everyday(ROWS))
def test_training_goes_on_after_a_merged_copy_was_made(ranks2, row):
    ranks2.run(unload_within, row)


def deep_copy_within(row: str) -> None:
    engine, optimizer = start(row)
    zoo.run_engine(engine, optimizer, CASE)
    with engine.full_parameters():
        whole = copy.deepcopy(engine.module).merge_and_unload()
    engine.close()
    right = logits(alone()[0])
    assert float((logits(whole) - right).norm() / right.norm()) < zoo.TOLERANCE


@pytest.mark.parametrize("row", everyday(ROWS))
def test_a_deep_copy_within_full_parameters_is_a_plain_model(ranks2, row):
    ranks2.run(deep_copy_within, row)
