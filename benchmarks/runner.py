"""Starts the ranks of every peer, visits the peers round by round, and ends everything when one rank fails."""

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import psutil

from benchmarks.config import Config
from benchmarks.peers import ORACLE, Spec
from benchmarks.stats import LossCheck, check_losses, ratios, visiting_order
from benchmarks.worker import Answer, Post, work

# When one rank fails the others fail after it, for want of it: wait this long for all reasons, to show the first cause.
_GRACE_SECONDS = 1.0
_LOG_TAIL = 30
_WORDLESS = "ended without a word"


class RankFailed(RuntimeError):
    """A rank died or raised; the message holds its traceback."""


@dataclass
class PeerResult:
    """All that was measured of one peer; lists of ranks are in rank order."""

    name: str
    family: str
    about: str
    obstacle: str | None = None
    """Why it did not run, if it did not; everything below is empty then."""
    seconds: list[float] = field(default_factory=list)
    """Seconds per step of the slowest rank, by round."""
    ratios: list[float] = field(default_factory=list)
    """`seconds` over the reference's of the same round."""
    others_cpu: list[float] = field(default_factory=list)
    """The share of the whole machine that other processes took meanwhile, by round, 0 to 1."""
    peak_memory: list[int] = field(default_factory=list)
    """Bytes, by rank."""
    at_rest: list[dict[str, int]] = field(default_factory=list)
    """Bytes by kind, by rank."""
    wire: list[float] = field(default_factory=list)
    """Bytes sent per step, by rank."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Calls in one step of rank 0, by operator."""
    own: list[dict[str, Any] | None] = field(default_factory=list)
    """What the peer reports of itself, by rank."""
    losses: list[list[float]] = field(default_factory=list)
    """Mean losses over ranks, in nats: one trajectory, or one per run for a peer that starts anew each time."""
    check: LossCheck | None = None


class Crew:
    """The ranks of one peer, each a process with a pipe to it."""

    def __init__(self, spec: Spec, config: Config, folder: Path, world_size: int, threads: int) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.logs = [folder / f"{spec.name}-{rank}.log" for rank in range(world_size)]
        for rank, log in enumerate(self.logs):
            post = Post(
                config=config,
                rank=rank,
                world_size=world_size,
                threads=threads,
                rendezvous=str(folder / f"{spec.name}.rendezvous"),
                log=str(log),
            )
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(spec, post, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, command: str, steps: int = 1) -> list[Any]:
        """Have all ranks carry out `command`, for `steps` where it trains; return their answers in rank order."""
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((command, steps))
            except OSError:
                self._fail({rank: self._how_it_died(rank)})
        return self.answers()

    def answers(self) -> list[Any]:
        """The next answer of every rank, in rank order."""
        values: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(values) + len(errors) < len(self.pipes):
            missing = [rank for rank in range(len(self.pipes)) if rank not in values and rank not in errors]
            ready = wait([self.pipes[rank] for rank in missing], timeout=_GRACE_SECONDS if errors else None)
            if not ready:
                break
            for rank in missing:
                if self.pipes[rank] in ready:
                    try:
                        answer: Answer = self.pipes[rank].recv()
                    except (EOFError, OSError):
                        errors[rank] = self._how_it_died(rank)
                        continue
                    if answer.error is None:
                        values[rank] = answer.value
                    else:
                        errors[rank] = answer.error
        if errors:
            self._fail(errors)
        return [values[rank] for rank in range(len(self.pipes))]

    def resident_bytes(self) -> int:
        """What all ranks together hold in memory now."""
        return sum(psutil.Process(process.pid).memory_info().rss for process in self.processes)

    def end(self) -> None:
        """End the ranks, whatever they are doing."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def _how_it_died(self, rank: int) -> str:
        self.processes[rank].join(_GRACE_SECONDS)
        log = self.logs[rank].read_text(errors="replace").splitlines()[-_LOG_TAIL:] if self.logs[rank].exists() else []
        return "\n".join([f"{_WORDLESS}, exit code {self.processes[rank].exitcode}; its last output:", *log])

    def _fail(self, errors: dict[int, str]) -> None:
        """Raise with the whole story of one rank, the first cause as far as can be told, and a line of each other."""
        # A process that the kernel has killed says nothing, while the others complain at once that it is gone.
        rank = next((rank for rank, text in errors.items() if text.startswith(_WORDLESS)), next(iter(errors)))
        lines = [f"{self.spec.name}, rank {rank}: {errors[rank].rstrip()}"]
        for other in errors.keys() - {rank}:
            lines.append(f"{self.spec.name}, rank {other}, too: {errors[other].rstrip().splitlines()[-1]}")
        raise RankFailed("\n".join(lines))


class Runner:
    """Measures a list of peers; a context manager, on whose exit no process is left.

    Peers that are alive together share their rounds. If memory does not take all of them at once they come in heats,
    the reference in each, so that every ratio is still one within a round.

    Args:
        config: What to run.
        specs: The peers that can run here.
        reference: Which of them the ratios are taken to.
        progress: Told, before each piece of work, what it is, how many are done and how many there are.
        together: At most this many peers at a time; None for as many as memory takes.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[Spec],
        reference: str,
        progress: Callable[[str, int, int], None],
        together: int | None = None,
    ) -> None:
        self.config, self.progress, self.together = config, progress, together
        self.specs = {spec.name: spec for spec in specs}
        self.results = {spec.name: PeerResult(spec.name, spec.family, spec.about) for spec in specs}
        self.reference = self.results[reference]
        self.folder = Path(tempfile.mkdtemp(prefix="benchmarks-"))
        self.crews: dict[str, Crew] = {}
        self._done = 0
        self._pieces = 1 + len(specs) * (1 + config.rounds)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for crew in self.crews.values():
            crew.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self) -> list[PeerResult]:
        """Measure everything; the results are in the order of the specs."""
        expected = self._expected_losses()
        waiting = [result for result in self.results.values() if result is not self.reference]
        self._inspect(self.reference)
        while True:
            heat = [self.reference]
            while waiting and self._has_room(len(heat)):
                heat.append(waiting.pop(0))
                self._inspect(heat[-1])
            for index in range(self.config.rounds):
                for place in visiting_order(len(heat), index):
                    self._begin(f"round {index + 1} of {self.config.rounds}: {heat[place].name}")
                    self._time(heat[place])
            self._judge(heat, expected)
            for result in heat[1:]:
                self._dismiss(result.name)
            if not waiting:
                self._dismiss(self.reference.name)
                return list(self.results.values())
            self._pieces += self.config.rounds  # the reference runs once more

    def _begin(self, what: str) -> None:
        self.progress(what, self._done, self._pieces)
        self._done += 1

    def _has_room(self, present: int) -> bool:
        """Whether one more peer may join those present; a heat has at least one beside the reference."""
        if present < 2:
            return True
        if self.together is not None:
            return present < self.together
        largest = max(crew.resident_bytes() for crew in self.crews.values())
        # Others use this machine's memory too, and a peer may take more than those before it.
        return psutil.virtual_memory().available > 2 * largest

    def _dismiss(self, name: str) -> None:
        crew = self.crews[name]
        crew.ask("close")
        crew.end()
        del self.crews[name]

    def _expected_losses(self) -> list[float]:
        """The losses of the first steps of one process that sees all tokens."""
        self._begin("losses of one process on the global batch")
        config = self.config
        crew = self.crews[ORACLE.name] = Crew(ORACLE, config, self.folder, 1, config.threads * config.ranks)
        crew.answers()
        # One step fewer than wanted, for the lead-in step is trained as well.
        crew.ask("train", config.warmup + config.steps - 1)
        ((losses,),) = crew.ask("losses")
        self._dismiss(ORACLE.name)
        return [float(loss) for loss in losses]

    def _inspect(self, result: PeerResult) -> None:
        """Start a peer and take everything but its time."""
        self._begin(f"{result.name}: memory, bytes, wire")
        config = self.config
        crew = self.crews[result.name] = Crew(
            self.specs[result.name], config, self.folder, config.ranks, config.threads
        )
        crew.answers()
        # Memory first, before the profiler adds its own.
        crew.ask("train", config.warmup)
        result.wire = [sent / config.steps for sent in crew.ask("wire", config.steps)]
        result.peak_memory = crew.ask("peak")
        result.collectives = crew.ask("collectives")[0]
        answers = crew.ask("report")
        result.at_rest = [answer["at_rest"] for answer in answers]
        result.own = [answer["own"] for answer in answers]

    def _time(self, result: PeerResult) -> None:
        """Visit a peer once."""
        start, busy = time.perf_counter(), _busy_seconds()
        answers = self.crews[result.name].ask("time", self.config.steps)
        whole_machine = (time.perf_counter() - start) * (psutil.cpu_count() or 1)
        others = _busy_seconds() - busy - sum(answer["cpu"] for answer in answers)
        result.seconds.append(max(answer["wall"] for answer in answers) / self.config.steps)
        result.others_cpu.append(min(1.0, max(0.0, others / whole_machine)))

    def _judge(self, heat: Sequence[PeerResult], expected: list[float]) -> None:
        """Fetch the losses and compare them; beyond the oracle's few steps, with the reference's if those are right."""
        for result in heat:
            by_rank = self.crews[result.name].ask("losses")
            result.losses = [
                [fmean(losses) for losses in zip(*trajectories, strict=True)]
                for trajectories in zip(*by_rank, strict=True)
            ]
        reference = self.reference
        if len(reference.losses) == 1 and check_losses(reference.losses, expected).passed:
            expected = expected + reference.losses[0][len(expected) :]
        for result in heat:
            # Without the other ranks' tokens only the first loss, that of the initial weights, is the global one.
            global_batch = self.specs[result.name].global_batch
            result.check = check_losses(result.losses, expected if global_batch else expected[:1])
            result.ratios = ratios(result.seconds, reference.seconds[-len(result.seconds) :])


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine, and those above it, have taken since it started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.steal)
