"""Saving and loading checkpoints side by side: ``python -m benchmarks.checkpoint``. Linux only.

Each rank is one process, which holds all contestants (`benchmarks.savers`): the same model after the same step. They
save and load in turns, in one folder. Before any is timed each has shown that it loads what it saved: all memory is set
to zero in between, and checksums are compared.

[Note: seconds] From one barrier to the next. A save ends when its files have reached the disk: each rank calls
fsync for its own, and when the call itself was over is shown as well. Before a save the kernel writes out
whatever else there is. A load is warm (out of the page cache) or cold (the kernel was told to drop the files).

[Note: extra memory] The high-water mark of the resident set (``VmHWM``) less the resident set before, of the rank where
that is most, in an untimed round of its own: before each measurement what malloc holds back is returned. Pages of a
mapped file that were read count as well.

[Note: bytes read] What calls of ``read`` and the like have returned (``rchar`` of ``/proc/self/io``), on the rank where
that is most. What is read from a mapped file is not in it.
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import page
from benchmarks.config import Config
from benchmarks.environment import describe
from benchmarks.measure import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.models import MODELS, build_model
from benchmarks.savers import CONTESTANTS, REFERENCE, AccelAlone, AccelFSDP, Contestant, Sharded
from benchmarks.saving import files_of, sync_files
from benchmarks.stats import Spread, ratios, visiting_order

Figures = dict[str, list[float]]
"""By what was measured, a value for each round: seconds or bytes."""
Results = dict[str, Figures]
"""By contestant."""

ELSEWHERE = ("accel_fsdp", "accel_zero2", "accel_fsdp, 1 rank")
"""What loads the directory that accel_fsdp has saved."""
_MIB = 2**20
_RESULTS = "results.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["gpt-23m", "gpt-80m"])
    parser.add_argument("--ranks", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--rounds", type=int, default=7, help="timed visits to each contestant")
    parser.add_argument("--folder", type=Path, help="a folder on the disk in question")
    page.add_out(parser)
    chosen = parser.parse_args(arguments)
    header = describe("benchmarks.checkpoint")
    texts, rounds = [], {}
    for model in chosen.models:
        config = Config(model=model, ranks=chosen.ranks, rounds=chosen.rounds)
        with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=chosen.folder) as folder:
            rounds[model] = measure(config, Path(folder))
        texts.append(report(config, rounds[model]))
        print(texts[-1], flush=True)
    if chosen.out is not None:
        page.write(chosen.out, "checkpoint", "\n".join(texts), rounds, header)


def measure(config: Config, folder: Path) -> Results:
    """Start the ranks, and have all contestants save and load in `folder`."""
    torch.multiprocessing.spawn(_work, (config.public(), folder), config.ranks)
    results: Results = json.loads((folder / _RESULTS).read_text())
    return results


def _work(rank: int, public: Mapping[str, Any], folder: Path) -> None:
    config = Config(**public, rank=rank)
    torch.set_num_threads(config.threads)
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        # With these Lightning takes the ranks for torchrun's, and launches none.
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(config.ranks),
        LOCAL_WORLD_SIZE=str(config.ranks),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # bound by nobody: the ranks meet at a file
        TORCHELASTIC_RUN_ID="benchmarks",
    )
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=config.ranks)
    try:
        race = _Race(config, folder)
        race.require_right()
        race.run(0, timed=False)
        for number in range(config.rounds):
            race.run(number)
        if rank == 0:
            (folder / _RESULTS).write_text(json.dumps(race.results))
    finally:
        dist.destroy_process_group()


class _Race:
    """One rank of it.

    Args:
        config: Seen from this rank.
        folder: Where all save.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.rank, self.ranks = config.rank, config.ranks
        self.folder = folder
        self.contestants = {name: make(config) for name, make in CONTESTANTS.items()}
        self.alone = AccelAlone(config)
        self.timed = True
        self.results: Results = {}

    def require_right(self) -> None:
        """Have everyone load what it has saved, and what accel_fsdp has saved loaded into other layouts."""
        for name, contestant in self.contestants.items():
            path, before = self.folder / name, contestant.digest()
            self._save(contestant, path)
            contestant.forget()
            contestant.load(path)
            assert contestant.digest() == before, f"{name} has not loaded what it has saved"
            if isinstance(contestant, AccelFSDP):
                right = contestant.whole()
                for other in ELSEWHERE[1:]:
                    taker = self._taker(other)
                    if taker is not None:
                        taker.forget()
                        taker.load(path)
                        assert taker.whole() == right, f"{other} has not loaded what {name} has saved"
                    dist.barrier()
            self._remove(path)

    def _taker(self, name: str) -> Sharded | None:
        """Who on this rank is called so in `ELSEWHERE`."""
        taker = self.contestants.get(name, self.alone if self.rank == 0 else None)
        assert taker is None or isinstance(taker, Sharded)
        return taker

    def run(self, number: int, *, timed: bool = True) -> None:
        """One round, of seconds or of memory."""
        self.timed = timed
        names = list(self.contestants)
        for index in visiting_order(len(names), number):
            name, path = names[index], self.folder / names[index]
            contestant, figures = self.contestants[name], self.results.setdefault(name, {})
            self._quieten()
            self._timed(figures, "save", lambda c=contestant, p=path: self._save(c, p))
            for owner in range(self.ranks):
                size = sum(file.stat().st_size for file in files_of(path, owner))
                figures.setdefault(f"bytes of rank {owner}", []).append(size)
            self._timed(figures, "warm load", lambda c=contestant, p=path: c.load(p))
            self._drop(path)
            self._timed(figures, "cold load", lambda c=contestant, p=path: c.load(p))
            if isinstance(contestant, AccelFSDP):
                for other in ELSEWHERE:
                    taker = self._taker(other)
                    load = (lambda t=taker, p=path: t.load(p)) if taker is not None else (lambda: None)
                    self._timed(self.results.setdefault(f"into {other}", {}), "warm load", load)
            self._remove(path)
            if isinstance(contestant, Sharded):
                self._background(figures, contestant, path)
                self._remove(path)

    def _save(self, contestant: Contestant, path: Path) -> float:
        """Save, and have it on the disk. See [Note: seconds].

        Returns:
            Seconds until the call was over.
        """
        start = time.perf_counter()
        contestant.save(path)
        own = time.perf_counter() - start
        sync_files(path, self.rank)
        return own

    def _background(self, figures: Figures, contestant: Sharded, path: Path) -> None:
        self._quieten()

        def save() -> float:
            start = time.perf_counter()
            contestant.begin_saving(path)
            own = time.perf_counter() - start
            contestant.finish_saving()
            return own

        self._timed(figures, "background", save)

    def _timed(self, figures: Figures, what: str, action: Callable[[], float | None]) -> None:
        """Do it, and add to the figures what it took."""
        if not self.timed:
            _trim()
        reset_peak()
        before, read = resident_bytes(), _read_bytes()
        dist.barrier()
        start = time.perf_counter()
        own = action()
        mine = own or 0.0, peak_resident_bytes() - before, _read_bytes() - read
        dist.barrier()
        seconds = time.perf_counter() - start
        everyone: list[tuple[float, int, int]] = [mine] * self.ranks
        dist.all_gather_object(everyone, mine)
        call, extra, read = (max(values) for values in zip(*everyone, strict=True))
        found = {"": seconds, " call": call} if self.timed else {" extra": extra, " read": read}
        for key, value in found.items():
            figures.setdefault(what + key, []).append(value)

    def _quieten(self) -> None:
        dist.barrier()
        if self.rank == 0:
            os.sync()
        dist.barrier()

    def _drop(self, path: Path) -> None:
        """Have the page cache without the files."""
        if self.rank == 0:
            for file in filter(Path.is_file, path.rglob("*")):
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()

    def _remove(self, path: Path) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path)
        dist.barrier()


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


# ---------------------------------------------------------------------- tables


def report(config: Config, results: Results) -> str:
    """The tables of one model, as text."""
    with torch.device("meta"):
        elements = sum(parameter.numel() for parameter in build_model(config).parameters())
    of_torch = results[REFERENCE]
    saving, loading, background = [], [], []
    for name, figures in results.items():
        if name.startswith("into "):
            continue
        speed = _range(ratios(of_torch["save"], figures["save"]))
        sizes = [figures[f"bytes of rank {rank}"][0] / 1e6 for rank in range(config.ranks)]
        saving.append(
            [name, _range(figures["save"]), speed, _median(figures["save call"]), _mib(figures["save extra"])]
            + [" ".join(f"{size:.1f}" for size in sizes)]
        )
        row = [name]
        for kind in ("warm load", "cold load"):
            row += [_range(figures[kind]), _range(ratios(of_torch[kind], figures[kind]))]
        loading.append([*row, _mib(figures["warm load extra"]), f"{figures['cold load read'][0] / 1e6:.1f}"])
        if "background" in figures:
            part = [call / whole for call, whole in zip(figures["background call"], figures["save"], strict=True)]
            background.append(
                [name, _range(figures["background call"]), _range(part), _range(figures["background"])]
                + [_mib(figures["background extra"])]
            )
    into = []
    for name in ELSEWHERE:
        figures = results[f"into {name}"]
        size = _mib(figures["warm load extra"]), f"{figures['warm load read'][0] / 1e6:.1f}"
        into.append([name, _range(figures["warm load"]), *size])
    tables = (
        (["saving", "s", "torch_save's / own", "s of the call", "extra MiB", "MB by rank"], saving),
        (
            ["loading", "warm s", "torch_save's / own", "cold s", "torch_save's / own", "extra MiB", "MB read"],
            loading,
        ),
        (["in the background", "training waits s", "of a save", "whole s", "extra MiB"], background),
        (["accel_fsdp's into", "warm s", "extra MiB", "MB read"], into),
    )
    head = (
        f"{config.model}: {elements / 1e6:.1f}M parameters, {12 * elements / 1e6:.1f} MB with AdamW's moments,"
        f" {config.ranks} ranks x {config.threads} threads, {config.rounds} rounds; medians [quartiles]"
    )
    return "\n\n".join([head, *(_table(columns, rows) for columns, rows in tables)]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _range(values: Sequence[float]) -> str:
    spread = Spread.of(values)
    return f"{spread.median:.3f} [{spread.lower_quartile:.3f}, {spread.upper_quartile:.3f}]"


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f}"


def _mib(values: Sequence[float]) -> str:
    return f"{statistics.median(values) / _MIB:.0f}"


if __name__ == "__main__":
    main()
