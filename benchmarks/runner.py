"""Starts the ranks of every peer and visits the peers round by round; one that fails is left out from then on."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType

import psutil

from benchmarks.config import Config
from benchmarks.crew import LIMIT_SECONDS, Crew, RankFailed
from benchmarks.models import units_per_step
from benchmarks.peers import ORACLE, Spec
from benchmarks.result import PeerResult
from benchmarks.saving import Saving
from benchmarks.stats import COMPARED_STEPS, TOLERANCES, check_losses, over, ratios, visiting_order


class Runner:
    """Measures a list of peers; a context manager, on whose exit no process is left.

    Peers that are alive together share their rounds. If memory does not take all of them at once they come in heats,
    the reference in each, so that every ratio is still one within a round.

    A peer that fails, or gives no answer in time, is ended and left out from then on. If it is the reference, the next
    peer takes its place.

    Args:
        config: What to run.
        specs: The peers that can run here.
        reference: Which of them the ratios are taken to.
        progress: Told, before each piece of work, what it is, how many are done and how many there are.
        together: At most this many peers at a time; None for as many as memory takes.
        limit: Seconds that a peer may take for one command.
        hosts: The network namespaces that the ranks of each peer are on; none for the machine's own.
        conditions: In each round all peers are visited under each of them in turn: called before the visits.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[Spec],
        reference: str,
        progress: Callable[[str, int, int], None],
        together: int | None = None,
        limit: float = LIMIT_SECONDS,
        hosts: Sequence[str] = (),
        conditions: Sequence[Callable[[], None]] = (lambda: None,),
    ) -> None:
        self.hosts, self.conditions = hosts, conditions
        self.config, self.progress, self.together, self.limit = config, progress, together, limit
        self.specs = {spec.name: spec for spec in specs}
        self.results = {spec.name: PeerResult(spec.name, spec.family, spec.about) for spec in specs}
        self.reference = self.results[reference]
        self.folder = Path(tempfile.mkdtemp(prefix="benchmarks-"))
        self.crews: dict[str, Crew] = {}
        self._done = 0
        self._pieces = 1 + len(specs) * (1 + config.rounds * len(conditions) + bool(config.saves))

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for crew in self.crews.values():
            crew.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self) -> list[PeerResult]:
        """Measure everything; the results are in the order of the specs.

        Raises:
            RankFailed: If there are no losses to compare with. What fails of the peers is part of their results.
        """
        expected = self._expected_losses()
        waiting = [self.reference, *(result for result in self.results.values() if result is not self.reference)]
        while waiting:
            while waiting and self._has_room(len(self.crews)):
                self._attempt(waiting[0], self._inspect)
                waiting.pop(0)
            heat = self._alive()
            for index in range(self.config.rounds if heat else 0):
                for condition in self.conditions:
                    condition()
                    for place in visiting_order(len(heat), index):
                        self._begin(f"round {index + 1} of {self.config.rounds}: {heat[place].name}")
                        if heat[place].name in self.crews:
                            self._attempt(heat[place], self._time)
            self._judge(expected)
            for result in self._alive():
                if result is not self.reference or not waiting:
                    self._attempt(result, self._dismiss)
            if waiting:
                self._pieces += self.config.rounds * len(self.conditions)  # the reference runs once more
        results = list(self.results.values())
        single = self.results.get("single")
        for result in results:
            if single is not None and single.ratios and result.ratios and result.ratio_to == single.ratio_to:
                result.over_single = over(result.ratios, single.ratios)
        return results

    def _alive(self) -> list[PeerResult]:
        return [result for name, result in self.results.items() if name in self.crews]

    def _attempt(self, result: PeerResult, action: Callable[[PeerResult], None]) -> None:
        """Do something with a peer, and end it if that fails."""
        try:
            action(result)
        except RankFailed as failure:
            result.failure, result.story = failure.brief, str(failure)
            self.crews.pop(result.name).end()

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

    def _dismiss(self, result: PeerResult) -> None:
        """Take a peer's last figures, and end it. If one of these fails, the others stay what they are."""
        crew = self.crews[result.name]
        try:
            # Late, as torch's profiler ends a process now and then: this figure is not there, and those before it are.
            result.allocator_peak = [peak for peak in crew.ask("allocator") if peak is not None]
            if self.config.saves:
                self._save(result, crew)
        except RankFailed as failure:
            result.story, result.unsaved = str(failure), f"{crew.command}: {failure.brief}"
        else:
            crew.ask("close")
        self.crews.pop(result.name).end()

    def _save(self, result: PeerResult, crew: Crew) -> None:
        """Have a peer save and load."""
        self._begin(f"{result.name}: saving and loading")
        found: list[Saving] = crew.ask("saving")
        checks = [saving.check for saving in found if saving.check is not None]
        result.load_check = max(checks, key=lambda check: check.difference)
        result.save_seconds = [max(seconds) for seconds in zip(*(saving.save for saving in found), strict=True)]
        result.load_seconds = [max(seconds) for seconds in zip(*(saving.load for saving in found), strict=True)]
        if not result.load_check.passed:
            off = f"{result.load_check.difference:.1e}"
            result.unsaved = f"what was loaded is not what was saved: a loss after that is off by {off} of its value"

    def _expected_losses(self) -> list[float]:
        """The losses of the first steps of one process that sees all batches."""
        self._begin("losses of one process on the global batch")
        config = self.config
        crew = Crew(ORACLE, config, self.folder, 1, config.threads * config.ranks, self.limit)
        self.crews[ORACLE.name] = crew
        crew.answers()
        # One step fewer than wanted, for the lead-in step is trained as well.
        crew.ask("train", config.warmup + config.steps - 1)
        ((losses,),) = crew.ask("losses")
        crew.ask("close")
        self.crews.pop(ORACLE.name).end()
        return [float(loss) for loss in losses]

    def _inspect(self, result: PeerResult) -> None:
        """Start a peer and take everything but its time."""
        self._begin(f"{result.name}: memory, bytes, wire")
        config = self.config
        result.units_per_step = units_per_step(config)
        crew = self.crews[result.name] = Crew(
            self.specs[result.name], config, self.folder, config.ranks, config.threads, self.limit, self.hosts
        )
        result.start_seconds = crew.answers()
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

    def _judge(self, expected: list[float]) -> None:
        """Fetch the losses and compare them; beyond the oracle's few steps, with the reference's if those are right."""
        for result in self._alive():
            self._attempt(result, self._collect_losses)
        alive = self._alive()
        if self.reference not in alive and alive:
            self.reference = alive[0]
        reference = self.reference
        tolerance = TOLERANCES[self.config.precision]
        if len(reference.losses) == 1 and check_losses(reference.losses, expected, tolerance).passed:
            expected = (expected + reference.losses[0][len(expected) :])[:COMPARED_STEPS]
        for result in alive:
            # Without the other ranks' batches only the first loss, that of the initial weights, is the global one.
            global_batch = self.specs[result.name].global_batch
            result.check = check_losses(result.losses, expected if global_batch else expected[:1], tolerance)
            result.ratios = ratios(result.seconds, reference.seconds[-len(result.seconds) :])
            result.ratio_to = reference.name

    def _collect_losses(self, result: PeerResult) -> None:
        by_rank = self.crews[result.name].ask("losses")
        result.losses = [
            [fmean(losses) for losses in zip(*trajectories, strict=True)] for trajectories in zip(*by_rank, strict=True)
        ]


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine, and those above it, have taken since it started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.steal)
