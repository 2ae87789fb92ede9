"""Unscaling, checking and clipping beside torch's: ``python -m benchmarks.clipping``.

One process, fp32, with the parameters of a GPT. torch's ``GradScaler.unscale_`` and ``clip_grad_norm_`` work on the
gradients of all parameters; the engine's on the same values where the row zero2 lets them rest. What the engine leaves
to the optimizer step is counted as well: what a fused AdamW step takes more with a factor than without.
``OMP_NUM_THREADS`` sets the threads.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from benchmarks.config import Config
from benchmarks.models import MODELS, build_model
from benchmarks.stats import Spread
from lightning_accel.core import Engine, GradScaler

SCALE = 2.0**16
LIMIT = 1e-3
"""Small enough a limit that clipping is always needed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the times of both and their ratio in the same round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt-23m", help="whose parameters")
    parser.add_argument("--rounds", type=int, default=21, help="timed visits to each")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        try:
            _compare(chosen.model, chosen.rounds)
        finally:
            dist.destroy_process_group()


def _compare(name: str, rounds: int) -> None:
    gradients = [torch.randn(p.shape) for p in build_model(Config(model=name)).parameters()]
    elements = sum(gradient.numel() for gradient in gradients)
    print(f"{name}: {elements / 1e6:.1f}M elements, {torch.get_num_threads()} threads, {rounds} rounds")
    theirs, ours = _torchs(name, gradients), _engines(name, gradients)
    norms = {which: run(True)[0] for which, run in (("torch", theirs), ("engine", ours))}
    print("norms: " + ", ".join(f"{which} {norm:.6g}" for which, norm in norms.items()))
    found: dict[str, list[float]] = {"torch": [], "engine": [], "left to the step": []}
    for _ in range(rounds):
        _, seconds, _ = theirs(True)
        found["torch"].append(seconds)
        _, seconds, with_factor = ours(True)
        _, _, without = ours(False)
        found["engine"].append(seconds)
        found["left to the step"].append(with_factor - without)
    for which, values in found.items():
        print(f"{which:16} {statistics.median(values) * 1e3:8.2f} ms")
    pairs = zip(found["torch"], found["engine"], found["left to the step"], strict=True)
    spread = Spread.of([(engine + left) / torchs for torchs, engine, left in pairs])
    print(f"ratio {spread.median:.2f} [{spread.lower_quartile:.2f}, {spread.upper_quartile:.2f}]")


Run = Callable[[bool], tuple[float, float, float]]
"""Norm, seconds of unscaling and clipping, seconds of the step; whether to unscale and clip at all (torch always
does)."""


def _torchs(name: str, gradients: Sequence[torch.Tensor]) -> Run:
    parameters = list(build_model(Config(model=name)).parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()

    def run(_: bool) -> tuple[float, float, float]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            torch.mul(gradient, SCALE, out=parameter.grad)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        start = time.perf_counter()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, LIMIT)
        middle = time.perf_counter()
        optimizer.step()
        return float(norm), middle - start, time.perf_counter() - middle

    return run


def _engines(name: str, gradients: Sequence[torch.Tensor]) -> Run:
    module = build_model(Config(model=name))
    engine = Engine(module, "zero2")
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    added = engine.add_optimizer(optimizer)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient * SCALE
    resting = added.gradients.tensors()
    kept = [tensor.clone() for tensor in resting]

    def run(clips: bool) -> tuple[float, float, float]:
        for tensor, values in zip(resting, kept, strict=True):
            tensor.copy_(values)
        scaler = GradScaler(init_scale=SCALE)
        start = time.perf_counter()
        norm = 0.0
        if clips:
            scaler.unscale_(optimizer)
            norm = float(engine.clip_grad_norm_(optimizer, LIMIT))
        middle = time.perf_counter()
        optimizer.step()
        return norm, middle - start, time.perf_counter() - middle

    return run


if __name__ == "__main__":
    main()
