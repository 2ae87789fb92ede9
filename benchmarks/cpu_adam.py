"""torch's fused CPU Adam beside DeepSpeed's: ``python -m benchmarks.cpu_adam``. Needs deepspeed and ninja.

Each size has one parameter, one gradient and one state, flat and fp32, as the engine's segments are. All kernels work
on that same memory, in turns: none has luck with its pages. ``OMP_NUM_THREADS`` sets the threads of both.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.stats import Spread

Make = Callable[[list[torch.nn.Parameter]], Optimizer]
Moments = tuple[Tensor, Tensor]
Prepare = Callable[[torch.nn.Parameter, Moments], Callable[[], object]]
"""What makes one step of a kernel on given memory."""
ADAMW = ("torch AdamW", "DeepSpeed AdamW")
ADAM = ("torch Adam", "DeepSpeed Adam")
KERNEL = ("torch kernel", "DeepSpeed kernel")
LR, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.999), 1e-8


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how far results are apart, then a line of times for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 40], help="elements of a segment")
    parser.add_argument("--total", type=float, default=40, help="millions of elements to work on before any again")
    parser.add_argument("--rounds", type=int, default=41, help="timed visits to each kernel")
    chosen = parser.parse_args(arguments)
    makes = _makes()
    kernels = {name: _stepping(make) for name, make in makes.items()} | _bare_kernels(makes["DeepSpeed AdamW"])
    print(f"{torch.get_num_threads()} threads, {chosen.rounds} rounds")
    print("ms of a step: median, quickest; processor ms: same.")
    print("Ratio to torch in the same round: median, quartiles; of processor time: same.")
    for ours, theirs in (ADAMW, ADAM):
        error = difference(makes[ours], makes[theirs])
        print(f"{theirs}: updates differ from torch's by {error:.1e} of their norm after 20 steps")
    for millions in chosen.millions:
        segments = max(1, round(chosen.total / millions))
        times = measure(kernels, int(millions * 1e6), segments, chosen.rounds)
        for ours, theirs in (ADAMW, ADAM, KERNEL):
            line = f"{segments} x {millions:g}M"
            for name in (ours, theirs):
                line += f" | {name}"
                for clock in zip(*times[name], strict=True):
                    line += f" {statistics.median(clock) * 1e3:.2f} {min(clock) * 1e3:.2f};"
            line += " | ratio"
            for clock in (0, 1):
                pairs = zip(times[ours], times[theirs], strict=True)
                ratio = Spread.of([b[clock] / a[clock] for a, b in pairs])
                line += f" {ratio.median:.2f} [{ratio.lower_quartile:.2f}, {ratio.upper_quartile:.2f}];"
            print(line, flush=True)


def _makes() -> dict[str, Make]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    same = {"lr": LR, "weight_decay": DECAY}
    return {
        "torch AdamW": lambda p: torch.optim.AdamW(p, fused=True, **same),
        "DeepSpeed AdamW": lambda p: DeepSpeedCPUAdam(p, adamw_mode=True, **same),
        "torch Adam": lambda p: torch.optim.Adam(p, fused=True, **same),
        "DeepSpeed Adam": lambda p: DeepSpeedCPUAdam(p, adamw_mode=False, **same),
    }


def _stepping(make: Make) -> Prepare:
    def prepare(parameter: torch.nn.Parameter, moments: Moments) -> Callable[[], object]:
        optimizer = make([parameter])
        step = torch.tensor(0.0) if type(optimizer).__module__.startswith("torch.") else 0
        optimizer.state[parameter] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        return optimizer.step

    return prepare


def _bare_kernels(deepspeeds: Make) -> dict[str, Prepare]:
    """AdamW by what the optimizers call once they have looked through their groups and state."""
    maker = deepspeeds([torch.nn.Parameter(torch.zeros(1))])

    def of_torch(parameter: torch.nn.Parameter, moments: Moments) -> Callable[[], object]:
        lists = [[value] for value in (parameter.data, parameter.grad, *moments)]
        options = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": DECAY, "eps": EPS}
        count = [torch.tensor(2.0)]
        return lambda: torch._fused_adamw_(*lists, [], count, **options, amsgrad=False, maximize=False)

    def of_deepspeed(parameter: torch.nn.Parameter, moments: Moments) -> Callable[[], object]:
        options = (2, LR, *BETAS, EPS, DECAY, True)
        return lambda: maker.ds_opt_adam.adam_update(maker.opt_id, *options, parameter.data, parameter.grad, *moments)

    return {"torch kernel": of_torch, "DeepSpeed kernel": of_deepspeed}


def difference(ours: Make, theirs: Make, elements: int = 1_000_003, steps: int = 20) -> float:
    """The norm of the difference of all updates of two optimizers, relative to that of the updates."""
    moved = []
    for make in (ours, theirs):
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(elements, generator=generator))
        start = parameter.detach().clone()
        optimizer = make([parameter])
        for _ in range(steps):
            parameter.grad = torch.randn(elements, generator=generator)
            optimizer.step()
        moved.append((parameter.detach() - start).double())
    return float((moved[0] - moved[1]).norm() / moved[0].norm())


def measure(
    kernels: dict[str, Prepare], elements: int, segments: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of processor time that all segments take, for each kernel and visit."""
    parameters = [torch.nn.Parameter(torch.randn(elements)) for _ in range(segments)]
    moments = [(torch.zeros(elements), torch.zeros(elements)) for _ in parameters]
    for parameter in parameters:
        parameter.grad = torch.randn(elements)
    steps = {
        name: [prepare(parameter, values) for parameter, values in zip(parameters, moments, strict=True)]
        for name, prepare in kernels.items()
    }
    for alike in steps.values():
        for step in alike:
            step()
    order, times = list(kernels), {name: [] for name in kernels}
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            begin, used = time.perf_counter(), time.process_time()
            for step in steps[name]:
                step()
            times[name].append((time.perf_counter() - begin, time.process_time() - used))
    return times


if __name__ == "__main__":
    main()
