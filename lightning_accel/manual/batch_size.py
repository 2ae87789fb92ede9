"""The largest batch size that fits: tried out, on all ranks alike."""

from __future__ import annotations

import functools
import gc
import inspect
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from lightning_accel.core.registry import open_engines
from lightning_accel.data.wire import host_group

T = TypeVar("T")

_SIGNS = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What errors say that are raised for lack of memory."""


@overload
def find_executable_batch_size(
    function: Callable[..., T],
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., T]: ...


@overload
def find_executable_batch_size(
    function: None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[[Callable[..., T]], Callable[..., T]]: ...


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., Any]:
    """Call a function with smaller and smaller batch sizes, until none of the ranks runs out of memory.

    Whoever runs out, all ranks try the next size: they compare notes after every try. Memory is freed in between, that
    of engines included, so models belong inside of the function. A rank that runs out while others wait for it in a
    collective is an error on all, when the process group's timeout has passed: they cannot be called back.

    Args:
        function: Gets the batch size as its first argument, and then what it is called with. All ranks call it.
        starting_batch_size: The first to try.
        reduce_batch_size_fn: Returns the next one to try, the same on all ranks. Default: nine tenths of the last,
            rounded down.

    Returns:
        The function without its first argument; or a decorator, if ``function`` is not given. The size that worked is
        what the next call begins with.

    Raises:
        RuntimeError: When called, if no size is left to try, another rank has failed for another reason, or ranks
            cannot go on together.
        TypeError: When called with too many arguments, such as a batch size.

    Example::

        @find_executable_batch_size(starting_batch_size=256)
        def train(batch_size, epochs): ...

        train(epochs=3)

    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    if starting_batch_size < 1:
        raise ValueError(f"Expected a positive starting_batch_size, got {starting_batch_size}.")
    size = starting_batch_size
    wanted = function

    @functools.wraps(wanted)
    def tried(*args: Any, **kwargs: Any) -> Any:
        nonlocal size
        try:
            inspect.signature(wanted).bind(size, *args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"Expected {wanted.__name__} to be called without its first argument, the batch size, which is found"
                f" for it: {error}."
            ) from None
        while size > 0:
            _free_memory()
            before = {id(engine) for engine in open_engines()}
            outcome = _attempt(wanted, size, args, kwargs)
            if not _ran_out(outcome, size):
                return outcome.result
            for engine in open_engines():
                if id(engine) not in before:  # also where memory was enough: its ranks train it together or not at all
                    engine.close(abandon=True)
            del outcome
            size = int(size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()
        raise RuntimeError(
            f"Expected some batch size from {starting_batch_size} down to 1 to fit into memory, but none did. Use a"
            " strategy that shards more (accel_fsdp), activation checkpointing, offload or a smaller model."
        )

    return tried


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error was raised for lack of memory, of an accelerator's or the host's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class _Outcome:
    """What became of one try on this rank."""

    def __init__(self, result: Any = None, error: Exception | None = None) -> None:
        self.result, self.error = result, error

    @property
    def told(self) -> tuple[bool, str]:
        """Whether memory ran out, and else what went wrong."""
        if self.error is None:
            return False, ""
        return is_out_of_memory(self.error), f"{type(self.error).__name__}: {self.error}"


def _attempt(function: Callable[..., Any], size: int, args: Any, kwargs: Any) -> _Outcome:
    try:
        return _Outcome(function(size, *args, **kwargs))
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they keep what took the memory
        return _Outcome(error=error)


def _ran_out(outcome: _Outcome, size: int) -> bool:
    """Whether any rank ran out of memory. All ranks call this after each try.

    Raises:
        Exception: What this rank has raised, if none did.
        RuntimeError: If another rank has failed, and none ran out of memory; or if some did while others waited for
            them, so that what connects the ranks is broken.

    """
    everyone = _gathered(outcome, size)
    out = [rank for rank, (ran_out, _) in enumerate(everyone) if ran_out]
    failed = [rank for rank, (ran_out, failure) in enumerate(everyone) if failure and not ran_out]
    if out and failed:
        raise RuntimeError(
            f"Expected ranks to run out of memory where no other waits for them. With a batch size of {size} rank"
            f" {out[0]} did while rank {failed[0]} was in a collective, which has failed ({everyone[failed[0]][1]})."
            " Ranks cannot be connected again within a process: start again with a smaller starting_batch_size."
        ) from outcome.error
    if outcome.error is not None and not out:
        raise outcome.error
    if failed:
        raise RuntimeError(f"rank {failed[0]} has failed: {everyone[failed[0]][1]}")
    return bool(out)


def _gathered(outcome: _Outcome, size: int) -> list[tuple[bool, str]]:
    """What became of the try on every rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [outcome.told]
    everyone: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, outcome.told, group=host_group(None))
    except RuntimeError as error:
        raise RuntimeError(
            f"Expected all ranks to come to the end of a try with a batch size of {size}, but some did not: here it"
            f" ended with {outcome.told[1] or 'success'}. If memory has run out on one of them, start again with a"
            " smaller starting_batch_size."
        ) from (outcome.error or error)
    return everyone


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
