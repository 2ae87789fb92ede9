"""What a peer is: something that trains the benchmark's model, one optimizer step at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.config import Config
from benchmarks.measure import Probe, census
from benchmarks.models import Batch, Batches, build_model
from benchmarks.saving import LOST_STEPS, Saving, Stopwatch


class Peer(ABC):
    """One way of training, driven from one process per rank.

    A subclass sets `model` (what is called with a batch) and `optimizer` in `wrap`; the loop is shared, so that
    all peers are timed around the same lines.
    """

    config: Config
    batches: Batches
    module: nn.Module
    """The bare module, whose parameters are the ones that are trained."""
    model: Callable[..., Tensor]
    optimizer: Optimizer

    has_phases = True
    """Whether the peer drives its own loop, so that forward, backward and update can be told apart."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.history: list[list[float]] = [[]]
        """This rank's losses in nats, all steps from the initial weights on; a list more for each new start."""

    def setup(self, config: Config) -> None:
        """Build everything up to the first step."""
        self.config = config
        self.batches = Batches(config)
        self.module = build_model(config)
        self.wrap()

    @abstractmethod
    def wrap(self) -> None:
        """Make `model` and `optimizer` out of `module`, as a user of this peer would."""

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Entered around each micro-batch; the peer's own way not to communicate before the last one, if it has any."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Entered around each forward; autocast, for peers that have no mixed precision of their own."""
        return nullcontext() if self.config.precision == "32-true" else torch.autocast("cpu", torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`, a scalar."""
        loss.backward()

    def clear(self) -> None:
        """Begin an optimizer step without gradients."""
        self.optimizer.zero_grad()

    def update(self) -> None:
        """End an optimizer step."""
        self.optimizer.step()

    def micro_batches(self, step: int) -> list[Batch]:
        """What this rank trains on in optimizer step `step`."""
        return self.batches.of_rank(step)

    def step(self) -> float:
        """Train one optimizer step; return this rank's mean loss in nats."""
        losses = self.history[-1]
        batches = self.micro_batches(len(losses))
        self.clear()
        total = 0.0
        for index, batch in enumerate(batches):
            with self.micro_batch(is_last=index == len(batches) - 1):
                with self.forward_context():
                    loss = self.model(*batch) / len(batches)
                self.backward(loss)
            total += loss.item()
        self.update()
        losses.append(total)
        return total

    def first_step(self) -> None:
        """Train the very first step; the last of what it takes to start."""
        self.step()

    def run(self, steps: int, probe: Probe | None = None) -> None:
        """Train one lead-in step and then `steps` more with `probe` held around them.

        The lead-in step puts the peer into its steady state: one that leaves communication in flight at the end of a
        step (and waits for it in the next) then pays for as many of them inside the window as it starts there.
        """
        self.step()
        with probe or nullcontext():
            for _ in range(steps):
                self.step()

    def save(self, path: Path) -> None:
        """Save what is trained into the empty folder `path`, as this peer's users do; by default rank 0 torch.save's.

        All ranks call it together.
        """
        if self.config.rank == 0:
            torch.save(self.state(), path / "checkpoint.pt")

    def state(self) -> dict[str, Any]:
        """What rank 0 saves by default."""
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, path: Path) -> None:
        """Load what was saved; by default every rank reads the one file. All ranks call it together."""
        self.load_file(path / "checkpoint.pt")

    def load_file(self, file: Path) -> None:
        """Load a file of `state`."""
        state = torch.load(file, weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def time_saving(self, folder: Path, times: int) -> Saving:
        """Save and load `times` times each, see `benchmarks.saving`; trains some steps."""
        stopwatch = Stopwatch(self, self.config.rank, folder, times)
        stopwatch.save()
        before = [self.step() for _ in range(LOST_STEPS)]
        stopwatch.load()
        del self.history[-1][-LOST_STEPS:]  # the same batches again
        after = [self.step() for _ in range(LOST_STEPS)]
        return stopwatch.result(self.history[-1][0], before, after)

    def settle(self) -> None:
        """Wait for communication that the last step has left in flight, if the peer does so."""
        return

    def report(self) -> dict[str, int]:
        """The bytes that this rank holds when an update is due, by kind; trains one step to find out."""
        found: dict[str, int] = {}

        def look(*_: Any) -> None:
            found.update(self.count())

        # While the step runs, and not before, an optimizer on shards shows the shards.
        handle = self.optimizers()[0].register_step_pre_hook(look)
        self.step()
        handle.remove()
        return found

    def count(self) -> dict[str, int]:
        """The bytes held right now, by kind."""
        return census(
            module=self.module,
            optimizers=self.optimizers(),
            ignore=self.batches.bank,
            more=self.more(),
            unseen=self.unseen(),
        )

    def optimizers(self) -> list[Optimizer]:
        """The torch optimizers that hold the state of this rank, under whatever wraps them."""
        return [self.optimizer]

    def more(self) -> Mapping[str, Iterable[Tensor]]:
        """Tensors by kind, where neither the module nor the optimizers show them."""
        return {}

    def unseen(self) -> int:
        """Bytes this peer is known to hold where no Python object shows them."""
        return 0

    def own_report(self) -> dict[str, Any] | None:
        """What the peer says of itself, recorded beside what is measured."""
        return None

    def teardown(self) -> None:
        """Let go of everything."""
        del self.model, self.optimizer, self.module


def bucket_bytes(model: DistributedDataParallel) -> int:
    """The bytes of DDP's reduction buckets; they live in C++, so this is DDP's own record of them."""
    if model.gradient_as_bucket_view:
        return 0  # the gradients are the buckets, and are counted as gradients
    record = model._get_ddp_logging_data()
    sizes = record.get("rebuilt_bucket_sizes") or record["bucket_sizes"]
    return sum(int(size) for size in str(sizes).split(","))
