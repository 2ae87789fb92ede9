"""The command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import environment, fit, memory, render
from benchmarks.config import Config
from benchmarks.crew import LIMIT_SECONDS, RankFailed
from benchmarks.models import MODELS
from benchmarks.peers import PEERS, REFERENCE, Spec, choose
from benchmarks.progress import progress
from benchmarks.result import PeerResult
from benchmarks.runner import Runner

EXAMPLES = """
examples:
  python -m benchmarks --quick                       every peer on a tiny model, for a first look
  python -m benchmarks                               every peer on the 23M model
  python -m benchmarks --peers single,torch_ddp,accel_zero2 --rounds 9
                                                     three peers, tighter medians
  python -m benchmarks --accumulate 4                four micro-batches per optimizer step
  python -m benchmarks --peers trainer_ddp,trainer_accel_ddp --reference trainer_ddp
                                                     the Trainer with its own strategy and with ours
  python -m benchmarks --memory --warmup 1           the memory of every moment of a step, ours beside FSDP2's
  python -m benchmarks --list                        what can be compared, and what cannot run here, and why

A peer that crashes, or gives no answer within --limit, is cut off and listed with the reason; the others go on.
The exit status is 1 if a peer fails or if its losses are wrong.
"""

FULL = Config()
QUICK = Config(model="gpt-tiny", rounds=3, steps=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("memory and wire are measured with the Linux kernel's counters; this is " + sys.platform)
    console = Console()
    default = memory.DEFAULT_PEERS if options.memory else tuple(PEERS)
    names = default if options.peers is None else [name.strip() for name in options.peers.split(",") if name.strip()]
    try:
        specs = choose(list(names))
        choose([options.reference])
    except ValueError as error:
        parser.error(str(error))
    obstacles = {
        spec.name: spec.obstacle("cpu") or (memory.obstacle(spec) if options.memory else None) for spec in specs
    }
    if options.list:
        console.print(render.peer_list(specs, obstacles))
        return 0
    able = [spec for spec in specs if obstacles[spec.name] is None]
    if not able:
        parser.error("; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items()))
    names = [spec.name for spec in able]
    reference = options.reference if options.reference in names else names[0]
    size = QUICK if options.quick else FULL
    config = Config(
        ranks=options.ranks,
        threads=options.threads,
        accumulate=options.accumulate,
        warmup=options.warmup,
        model=options.model or size.model,
        rounds=options.rounds or size.rounds,
        steps=options.steps or size.steps,
    )
    header = environment.describe() | {"config": config.public(), "reference": reference}
    now = datetime.now(timezone.utc)
    out = options.out or Path(__file__).parent / "results" / f"{now:%Y%m%d-%H%M%S}-{config.model}"
    if short := fit.shortage(config, len(able)):
        parser.error(short)
    if options.memory:
        return _record_memory(console, header, config, able, out, options.limit)
    try:
        measured = {result.name: result for result in _measure(config, able, reference, options)}
    except RankFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    header["machine"]["load_after"] = os.getloadavg()[0]
    results = [
        measured.get(spec.name) or PeerResult(spec.name, spec.family, spec.about, obstacle=obstacles[spec.name])
        for spec in specs
    ]
    console.print(render.tables(header, results))
    out.mkdir(parents=True, exist_ok=True)
    render.write_jsonl(out / "results.jsonl", header, results)
    (out / "table.md").write_text(render.markdown(header, results))
    if any(result.status in ("valid", "invalid") for result in results):
        render.draw(out / "chart.png", header, results)
    console.print(f"results.jsonl, table.md and chart.png are in {out}", soft_wrap=True)
    wrong = [result.name for result in results if result.status == "invalid"]
    if wrong:
        print(f"The losses of {', '.join(wrong)} are wrong, so the figures mean nothing there.", file=sys.stderr)
    stories = [result.story for result in results if result.status == "failed"]
    for story in stories:
        print(story, file=sys.stderr)
    return 1 if wrong or stories else 0


def _record_memory(
    console: Console, header: dict[str, Any], config: Config, specs: Sequence[Spec], out: Path, limit: float
) -> int:
    """Record one step of each peer; return the exit status."""
    with progress() as report:
        results, failures = memory.record(config, specs, report, limit)
    for failure in failures:
        print(failure, file=sys.stderr)
    if not results:
        return 1
    console.print(memory.table(header, results))
    out.mkdir(parents=True, exist_ok=True)
    memory.write_jsonl(out / "memory.jsonl", header, results)
    (out / "memory.md").write_text(memory.markdown(header, results))
    memory.draw(out / "memory.png", header, results)
    console.print(f"memory.jsonl, memory.md and memory.png are in {out}", soft_wrap=True)
    return 1 if failures else 0


def _measure(config: Config, specs: Sequence[Spec], reference: str, options: argparse.Namespace) -> list[PeerResult]:
    limits = {"together": options.together, "limit": options.limit}
    with progress() as report, Runner(config, specs, reference, report, **limits) as runner:
        return runner.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Step time, memory and communication of our rows beside what people would use instead.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--peers",
        metavar="A,B,C",
        help=f"out of {', '.join(PEERS)} (default: all; with --memory {', '.join(memory.DEFAULT_PEERS)})",
    )
    add(
        "--reference",
        default=REFERENCE,
        metavar="A",
        help="has ratio 1.00 (default: %(default)s, else the first)",
    )
    add("--model", choices=MODELS, help=f"(default: {FULL.model})")
    add("--rounds", type=_positive, metavar="N", help=f"visits to every peer (default: {FULL.rounds})")
    add("--steps", type=_positive, metavar="N", help=f"timed optimizer steps of a visit (default: {FULL.steps})")
    add("--warmup", type=_positive, default=2, metavar="N", help="untimed first steps (default: %(default)s)")
    add("--accumulate", type=_positive, default=1, metavar="N", help="micro-batches per step (default: %(default)s)")
    add("--ranks", type=_positive, default=2, metavar="N", help="processes of each peer (default: %(default)s)")
    add("--threads", type=_positive, default=1, metavar="N", help="threads of each process (default: %(default)s)")
    add("--together", type=_positive, metavar="N", help="peers alive at a time (default: what memory takes)")
    add(
        "--limit",
        type=_positive,
        default=int(LIMIT_SECONDS),
        metavar="S",
        help="seconds that a peer may take to start, and for each visit (default: %(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help=f"unless given: {QUICK.model}, {QUICK.rounds} rounds of {QUICK.steps} steps",
    )
    add(
        "--memory",
        action="store_true",
        help="instead of all else: the bytes of all tensors at every moment of one step, as a table and a chart",
    )
    add("--out", type=Path, metavar="DIR", help="where to write (default: a new folder in benchmarks/results)")
    add("--list", action="store_true", help="list the peers and whether they run here, and stop")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value
