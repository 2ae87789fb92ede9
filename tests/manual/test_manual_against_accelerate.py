"""The same script with Accelerate's own Accelerator and with ours, where Accelerate's is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FLOAT64, Net, Samples
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from harness import Ranks


def script(accelerator: Any, split: bool, steps: int, size: int) -> dict[str, Any]:
    """Two epochs of training and one of evaluation; what a user sees of them."""
    net = Net()
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.02)
    batch_size = 8 if split else 4
    loader: Any = DataLoader(Samples(size), batch_size=batch_size)
    evaluation: Any = DataLoader(Samples(13), batch_size=batch_size)
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * -(-len(loader) // steps))
    model, optimizer, loader, evaluation, scheduler = accelerator.prepare(net, optimizer, loader, evaluation, schedule)
    seen: dict[str, Any] = {"sync": [], "rates": [], "losses": [], "norms": [], "batches": []}
    for _ in range(2):
        for index, x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    seen["norms"].append(accelerator.clip_grad_norm_(model.parameters(), 0.3).item())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen["sync"].append(accelerator.sync_gradients)
            seen["rates"] += scheduler.get_last_lr()
            seen["losses"].append(accelerator.reduce(loss, "mean").item())
            seen["batches"].append(index.tolist())
    model.eval()
    with torch.no_grad():
        found = [accelerator.gather_for_metrics({"i": index, "p": model(x)}) for index, x, _ in evaluation]
    seen["indices"] = torch.cat([batch["i"] for batch in found]).tolist()
    seen["predictions"] = torch.cat([batch["p"] for batch in found]).flatten().tolist()
    seen["objects"] = accelerator.gather_for_metrics([f"of {accelerator.process_index}"], use_gather_object=True)
    with accelerator.split_between_processes(list(range(5)), apply_padding=True) as share:
        seen["share"] = share
    lengths = torch.arange(2 + accelerator.process_index)
    seen["padded"] = accelerator.gather(accelerator.pad_across_processes(lengths, pad_index=-1)).tolist()
    return seen


def theirs(split: bool, steps: int, size: int) -> dict[str, Any]:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState, GradientState

    try:
        config = DataLoaderConfiguration(split_batches=split)  # of its own split_batches it takes no notice
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps, dataloader_config=config)
        return script(accelerator, split, steps, size)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def ours(split: bool, steps: int, size: int) -> dict[str, Any]:
    from lightning_accel import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps, split_batches=split)
    return script(accelerator, split, steps, size)


@pytest.mark.parametrize(
    ("split", "steps", "size"), [(False, 2, 32), pytest.param(True, 1, 30, marks=pytest.mark.matrix)]
)
def test_the_same_script(ranks2: Ranks, split: bool, steps: int, size: int) -> None:
    pytest.importorskip("accelerate")
    results = ranks2.run(theirs, split, steps, size), ranks2.run(ours, split, steps, size)
    for expected, found in zip(*results, strict=True):
        for name in ("sync", "batches", "indices", "objects", "share", "padded"):
            assert found[name] == expected[name], name
        # Behind the last step no rate is used any more. torch's goes up again there, ours stays at the schedule's end.
        expected["rates"].pop()
        assert found["rates"].pop() == pytest.approx(0.1 / 25 / 1e4)  # max_lr / div_factor / final_div_factor
        for name in ("rates", "losses", "norms", "predictions"):
            assert found[name] == pytest.approx(expected[name], rel=100 * FLOAT64), name
