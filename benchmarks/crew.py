"""The ranks of one peer: processes with a pipe to each, cut off when they fail or give no answer in time."""

import multiprocessing
import signal
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.config import Config
from benchmarks.peers import Spec
from benchmarks.worker import Answer, Post, work

LIMIT_SECONDS = 300.0
"""How long a peer may take for one command, unless told otherwise."""

# When one rank fails the others fail after it, for want of it: wait this long for all reasons, to show the first cause.
_GRACE_SECONDS = 1.0
# How long a rank may take to write down where it is.
_LAST_WORDS_SECONDS = 5.0
_LOG_TAIL = 30
_WORDLESS = "ended without a word"


class RankFailed(RuntimeError):
    """A rank died, raised or gave no answer; the message holds its traceback.

    Args:
        brief: What happened, in one line.
        story: All that is known.
    """

    def __init__(self, brief: str, story: str) -> None:
        super().__init__(story)
        self.brief = brief


class Crew:
    """The ranks of one peer, each a process with a pipe to it.

    Args:
        spec: The peer.
        config: The run, seen from any rank.
        folder: For the files that the ranks meet at and print to.
        world_size: How many ranks.
        threads: Compute threads of each.
        limit: Seconds that one command may take, the start included.
        hosts: The network namespaces that the ranks are on (`benchmarks.hosts`); none for the machine's own.
    """

    def __init__(
        self,
        spec: Spec,
        config: Config,
        folder: Path,
        world_size: int,
        threads: int,
        limit: float = LIMIT_SECONDS,
        hosts: Sequence[str] = (),
    ) -> None:
        self.spec, self.limit = spec, limit
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.logs = [folder / f"{spec.name}-{rank}.log" for rank in range(world_size)]
        self.command = "start"
        """What the ranks were told last."""
        for rank, log in enumerate(self.logs):
            post = Post(
                config=config,
                rank=rank,
                world_size=world_size,
                threads=threads,
                rendezvous=str(folder / f"{spec.name}.rendezvous"),
                checkpoints=str(folder / f"{spec.name}.checkpoints"),
                born=time.perf_counter(),
                log=str(log),
                hosts=hosts,
            )
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(spec, post, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, command: str, steps: int = 1) -> list[Any]:
        """Have all ranks carry out `command`, for `steps` where it trains; return their answers in rank order.

        Raises:
            RankFailed: If a rank fails, or the last answer is not there in time.
        """
        self.command = command
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((command, steps))
            except OSError:
                self._fail({rank: self._how_it_died(rank)})
        return self.answers()

    def answers(self) -> list[Any]:
        """The next answer of every rank, in rank order.

        Raises:
            RankFailed: If a rank fails, or the last answer is not there in time.
        """
        values: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + self.limit
        while len(values) + len(errors) < len(self.pipes):
            missing = [rank for rank in range(len(self.pipes)) if rank not in values and rank not in errors]
            patience = _GRACE_SECONDS if errors else max(0.0, deadline - time.monotonic())
            ready = wait([self.pipes[rank] for rank in missing], timeout=patience)
            if not ready:
                if not errors:
                    self._cut_off(missing)
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
        code = self.processes[rank].exitcode
        return "\n".join([f"{_WORDLESS}, exit code {code}; its last output:", *self._last_output(rank)])

    def _last_output(self, rank: int) -> list[str]:
        log = self.logs[rank]
        return log.read_text(errors="replace").splitlines()[-_LOG_TAIL:] if log.exists() else []

    def _cut_off(self, silent: Iterable[int]) -> None:
        """Raise for ranks that gave no answer, after they have written down where they are."""
        silent = list(silent)
        for rank in silent:
            process = self.processes[rank]
            if process.pid is not None and process.is_alive():
                psutil.Process(process.pid).send_signal(signal.SIGABRT)  # faulthandler prints the stacks of all threads
        for rank in silent:
            self.processes[rank].join(_LAST_WORDS_SECONDS)
        ranks = " and ".join(str(rank) for rank in silent)
        brief = f"no answer to {self.command!r} from rank {ranks} within {self.limit:g} s"
        story = [f"{self.spec.name}: {brief}"]
        for rank in silent:
            story += [f"{self.spec.name}, rank {rank}, where it was:", *self._last_output(rank)]
        raise RankFailed(brief, "\n".join(story))

    def _fail(self, errors: dict[int, str]) -> None:
        """Raise with the whole story of one rank, the first cause as far as can be told, and a line of each other."""
        # A process that the kernel has killed says nothing, while the others complain at once that it is gone.
        rank = next((rank for rank, text in errors.items() if text.startswith(_WORDLESS)), next(iter(errors)))
        text = errors[rank].rstrip()
        lines = [f"{self.spec.name}, rank {rank}: {text}"]
        for other in errors.keys() - {rank}:
            lines.append(f"{self.spec.name}, rank {other}, too: {errors[other].rstrip().splitlines()[-1]}")
        # The first line of a death says how, the last one of a traceback says why.
        brief = text.splitlines()[0].split(";")[0] if text.startswith(_WORDLESS) else _error_of(text)
        raise RankFailed(f"rank {rank}: {brief}", "\n".join(lines))


def _error_of(trace: str) -> str:
    """The line of a traceback that names the error; messages may have several lines."""
    lines = trace.splitlines()
    after = max((index for index, line in enumerate(lines) if line.startswith("  ")), default=-1) + 1
    named = [line for line in lines[after:] if line.strip()]
    return named[0] if named else lines[-1]
