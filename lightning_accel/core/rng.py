"""The state of a process's random numbers: as tensors and numbers, and put back bit by bit.

A state is a dictionary that ``torch.load(weights_only=True)`` reads, about 10 KB of it::

    torch        uint8 (5056,)     the CPU's generator
    python       {"words": int32 (625,), "gauss": float | None}     the module `random`
    numpy        {"words": int32 (624,), "position": int, "gauss": float | None}, None if numpy is not in use
    accelerator  uint8, None without one
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Any]

_PYTHON_VERSION = 3
"""Of the format of `random.getstate`: the same since Python 3.2."""
_MERSENNE = "MT19937"


def collect(device: torch.device | None = None) -> State:
    """The state of all generators that a process draws from without naming one.

    Args:
        device: The accelerator whose current generator belongs to it; none for the CPU.

    """
    accelerator = _accelerator(device)
    return {
        "torch": torch.get_rng_state(),
        "python": _from_python(random.getstate()),
        "numpy": _numpy_state(),
        "accelerator": None if accelerator is None else accelerator.get_rng_state(),
    }


def collect_later() -> Callable[[], State]:
    """What returns the state as it is now (an accelerator's left out), at about half the cost if it is never asked.

    For what is noted before every batch, and looked at when a checkpoint is made.
    """
    ours, pythons, numpys = torch.get_rng_state(), random.getstate(), _raw_numpy_state()
    return lambda: {
        "torch": ours,
        "python": _from_python(pythons),
        "numpy": _from_numpy(numpys),
        "accelerator": None,
    }


def restore(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put a state back: what is drawn next is what would have been drawn next when it was collected.

    Args:
        state: From ``collect`` or ``derive``.
        device: An accelerator, if its generator is to be set. One that the state has nothing of, as it was collected on
            the CPU, is seeded with a number that depends on the state alone.

    """
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(_to_python(state["python"]))
    _set_numpy_state(state["numpy"])
    accelerator = _accelerator(device)
    if accelerator is None:
        return
    if state["accelerator"] is None:
        accelerator.manual_seed(_seed(state, "accelerator"))
    else:
        accelerator.set_rng_state(state["accelerator"].cpu())


def derive(state: Mapping[str, Any], rank: int) -> State:
    """The state that a rank begins with which was not there when the others' were collected.

    It depends on ``state`` and ``rank`` alone, so that a run can be repeated.

    Args:
        state: That of rank 0.
        rank: The new rank.

    """
    seed = _seed(state, f"rank {rank}")
    python = random.Random(seed)
    numpy = None
    if state["numpy"] is not None:
        words = torch.tensor([python.getrandbits(32) - 2**31 for _ in range(624)], dtype=torch.int32)
        numpy = {"words": words, "position": 624, "gauss": None}
    return {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "python": _from_python(python.getstate()),
        "numpy": numpy,
        "accelerator": None,
    }


class Stream:
    """Random numbers beside those of the process.

    Args:
        state: Where they begin; that of the process if not given.

    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.state: Mapping[str, Any] = collect() if state is None else state
        """Where they are now. (An accelerator's are left alone.)"""

    @contextlib.contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Within it, the CPU's random numbers are this stream's; afterwards those of the process go on."""
        before = collect()
        restore(self.state)
        try:
            yield
        finally:
            self.state = {**collect(), "accelerator": self.state["accelerator"]}
            restore(before)


def generator_state(generator: Any) -> Any:
    """The state of a generator object, as tensors and numbers.

    Args:
        generator: A ``torch.Generator``, a ``random.Random`` or one of numpy's.

    """
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _from_python(generator.getstate())
    if hasattr(generator, "bit_generator"):
        return _as_tensors(generator.bit_generator.state)
    return _as_tensors(generator.get_state(legacy=False))


def set_generator_state(generator: Any, state: Any) -> None:
    """Put back what ``generator_state`` has said of the same kind of generator."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(_to_python(state))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _as_arrays(state)
    else:
        generator.set_state(_as_arrays(state))


def is_generator(value: Any) -> bool:
    """Whether ``generator_state`` knows it."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _accelerator(device: torch.device | None) -> ModuleType | None:
    """What torch has for a device's generator: a module such as `torch.cuda`."""
    module = None if device is None or device.type == "cpu" else getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


def _seed(state: Mapping[str, Any], purpose: str) -> int:
    """A number that is hard to tell from a random one; 63 bits."""
    digest = hashlib.sha256(bytes(state["torch"].tolist()) + purpose.encode())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _from_python(state: tuple[Any, ...]) -> State:
    version, words, gauss = state
    assert version == _PYTHON_VERSION
    return {"words": torch.frombuffer(array("I", words), dtype=torch.int32).clone(), "gauss": gauss}


def _to_python(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return _PYTHON_VERSION, tuple(word & 0xFFFFFFFF for word in state["words"].tolist()), state["gauss"]


def _numpy_state() -> State | None:
    return _from_numpy(_raw_numpy_state())


def _raw_numpy_state() -> Any:
    numpy = sys.modules.get("numpy")  # who has not imported it has drawn nothing from it
    return None if numpy is None else numpy.random.get_state(legacy=False)


def _from_numpy(state: Any) -> State | None:
    if state is None or state["bit_generator"] != _MERSENNE:  # the user has put in another: its own business
        return None
    return {
        "words": _signed(state["state"]["key"]),
        "position": int(state["state"]["pos"]),
        "gauss": float(state["gauss"]) if state["has_gauss"] else None,
    }


def _set_numpy_state(state: Mapping[str, Any] | None) -> None:
    if state is None:
        return
    import numpy

    gauss = state["gauss"]
    key = state["words"].cpu().numpy().view(numpy.uint32)
    numpy.random.set_state((_MERSENNE, key, state["position"], int(gauss is not None), gauss or 0.0))


def _signed(words: Any) -> Tensor:
    """An array of unsigned numbers as int32: not all that reads tensors knows the unsigned ones."""
    return torch.from_numpy(words.view("int32").copy())


def _as_tensors(state: Any) -> Any:
    """Of numpy's: nested dictionaries of texts, numbers (some of 128 bits) and arrays."""
    if isinstance(state, Mapping):
        return {name: _as_tensors(value) for name, value in state.items()}
    return {"words": _signed(state), "dtype": state.dtype.name} if hasattr(state, "dtype") else state


def _as_arrays(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    if state.keys() == {"words", "dtype"}:
        return state["words"].cpu().numpy().view(state["dtype"])
    return {name: _as_arrays(value) for name, value in state.items()}
