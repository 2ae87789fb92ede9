"""Memory for the engine's buffers, and for the gradients on their way to them.

Whoever wants to know what memory is taken for watches: the engine says so of each of its buffers (``taken``).

[Note: freed gradients]
The engine frees each gradient as soon as it is written to its buffer, while backward goes on. glibc gives freed memory
at the top of its heap back to the system, and the next gradient faults it in again, page by page: measured on a GPT of
23M parameters, 15,000 page faults a step where plain training has none, and 30 ms of system time in 900. So on the CPU
glibc is told to keep freed memory, which training needs again at once. The environment variables that tune glibc's
malloc take precedence.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Purpose: TypeAlias = Literal["parameters", "master_parameters", "gathered", "gradients"]
"""What the engine takes memory for. ``gathered``: whole parameters that rest sharded."""

_HUGE_PAGE = 2 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**31 - 1
"""Freed memory at the top of the heap that is kept: the most that mallopt takes."""
_MMAP_BYTES = 32 * 2**20
"""Allocations below this come from the heap: the most that glibc allows."""


_watchers: list[Callable[[Tensor, Purpose], None]] = []


@contextlib.contextmanager
def watched(watcher: Callable[[Tensor, Purpose], None]) -> Iterator[None]:
    """Within it, ``watcher`` is told of each buffer of any engine, and of what it is for."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def taken(tensor: Tensor, purpose: Purpose) -> Tensor:
    """Tell those who watch that memory was taken. Returns the tensor."""
    for watcher in _watchers:
        watcher(tensor, purpose)
    return tensor


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep freed memory, once for the process. See [Note: freed gradients]."""
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if platform.libc_ver()[0] == "glibc" and not tuned:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed 1-D tensor for long use.

    On the CPU it lies in huge pages where Linux gives them to those who ask (the usual setting): walking a buffer of
    many MiB then misses the TLB far less often. Where something stands between torch and its allocations (a dispatch
    mode such as torch's fake tensors) memory comes from torch, so that it sees all of it.

    Args:
        numel: Number of elements.
        dtype: Their type.
        device: Where they live.

    """
    size = numel * dtype.itemsize
    is_seen = torch._C._len_torch_dispatch_stack() > 0
    if device.type != "cpu" or size < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE") or is_seen:
        return torch.zeros(numel, dtype=dtype, device=device)
    block = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    skip = -whole.data_ptr() % _HUGE_PAGE
    return whole[skip : skip + size].view(dtype)
