"""What an ``Accelerator`` knows of the processes, and has them tell each other."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from lightning.fabric import Fabric

from lightning_accel.manual.environment import Ranks
from lightning_accel.manual.operations import first_samples, map_leaves, share
from lightning_accel.manual.peers import Peers
from lightning_accel.manual.watching import LoaderWatch

F = TypeVar("F", bound=Callable[..., Any])


class Processes:
    """Base of ``Accelerator``, which sets the attributes."""

    fabric: Fabric
    """Lightning's Fabric, which this is built on."""
    _ranks: Ranks
    _peers: Peers
    _loaders: LoaderWatch
    _triggered: bool

    # ------------------------------------------------------------------- ranks

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.fabric.device

    @property
    def num_processes(self) -> int:
        """How many processes there are on all machines."""
        return self._ranks.ranks

    @property
    def process_index(self) -> int:
        """Which of them this is."""
        return self._ranks.rank

    @property
    def local_process_index(self) -> int:
        """Which of those of this machine this is."""
        return self._ranks.local_rank

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self._ranks.ranks > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self._ranks.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is process 0 of its machine."""
        return self._ranks.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last process of all."""
        return self._ranks.rank == self._ranks.ranks - 1

    # ------------------------------------------------------------ some of them

    def on_main_process(self, function: F) -> F:
        """A function that process 0 alone runs; it returns None on the others. Also as a decorator."""
        return _only_if(self.is_main_process, function)

    def on_local_main_process(self, function: F) -> F:
        """A function that process 0 of each machine runs; it returns None on the others."""
        return _only_if(self.is_local_main_process, function)

    def on_last_process(self, function: F) -> F:
        """A function that the last process alone runs; it returns None on the others."""
        return _only_if(self.is_last_process, function)

    @overload
    def on_process(self, function: F, process_index: int) -> F: ...

    @overload
    def on_process(self, function: None = None, *, process_index: int) -> Callable[[F], F]: ...

    def on_process(self, function: Any = None, process_index: int | None = None) -> Any:
        """A function that one process alone runs; it returns None on the others.

        Args:
            function: The function; left out where this is a decorator with arguments.
            process_index: Which process.

        Raises:
            ValueError: If there is no such process.

        """
        if process_index is None:
            raise ValueError("Expected process_index to say which process is to run the function, got None.")
        self._peers.require_rank(process_index)
        if function is None:
            return lambda given: _only_if(self.process_index == process_index, given)
        return _only_if(self.process_index == process_index, function)

    @overload
    def on_local_process(self, function: F, local_process_index: int) -> F: ...

    @overload
    def on_local_process(self, function: None = None, *, local_process_index: int) -> Callable[[F], F]: ...

    def on_local_process(self, function: Any = None, local_process_index: int | None = None) -> Any:
        """A function that one process of each machine runs; it returns None on the others.

        Args:
            function: The function; left out where this is a decorator with arguments.
            local_process_index: Which process of its machine.

        Raises:
            ValueError: If there is no such process.

        """
        count = self._ranks.local_ranks
        if local_process_index is None or not 0 <= local_process_index < count:
            raise ValueError(f"Expected local_process_index from 0 to {count - 1}, got {local_process_index}.")
        if function is None:
            return lambda given: _only_if(self.local_process_index == local_process_index, given)
        return _only_if(self.local_process_index == local_process_index, function)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Process 0 runs the block first; the others when it has, even if it has failed. All processes enter it."""
        with self._goes_first(self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Process 0 of each machine runs the block first. All processes enter it."""
        with self._goes_first(self.is_local_main_process):
            yield

    @contextmanager
    def _goes_first(self, first: bool) -> Iterator[None]:
        if not first:
            self.wait_for_everyone()
        try:
            yield
        finally:
            if first:
                self.wait_for_everyone()

    def wait_for_everyone(self) -> None:
        """Wait until all processes have come here."""
        self._peers.compare("wait_for_everyone")
        self.fabric.barrier()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on process 0 of each machine."""
        if self.is_local_main_process:
            builtins.print(*args, **kwargs)

    # ------------------------------------------------------------- tell others

    def gather(self, tensor: Any) -> Any:
        """The tensors of all processes, one after the other along their first dimension, on every process.

        Args:
            tensor: Of shape ``[n, ...]``, the same on each process, or a nested structure of such; a 0-dim tensor
                counts as ``[1]``.

        Returns:
            The same structure; shapes have become ``[num_processes * n, ...]``. No gradient goes through it.

        Raises:
            ValueError: If the processes' shapes or dtypes differ; on every process, with who has what.
            TypeError: If there is anything but tensors.

        """
        return self._peers.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As ``gather``, without the samples that fill up the last batch of a prepared loader.

        Within ``join_uneven_inputs`` ranks may have different numbers of samples, or none.

        Args:
            input_data: Tensors whose first dimension are the samples of a batch; or objects.
            use_gather_object: Gather objects, lists of one entry for each sample. Happens by itself where there is
                anything but tensors.

        Raises:
            ValueError: As ``gather``.
            TypeError: If objects come in a dictionary or a tuple, whose entries are no samples.

        """
        tensors: list[bool] = []
        map_leaves(input_data, lambda _, leaf: tensors.append(isinstance(leaf, torch.Tensor)))
        as_objects = use_gather_object or not all(tensors)
        if as_objects and isinstance(input_data, (Mapping, tuple)):  # nobody could leave the duplicates out
            raise TypeError(
                "Expected tensors, or a list of one object for each sample, to gather for metrics, got a"
                f" {type(input_data).__name__} with other things than tensors. Gather its entries one by one:"
                " accelerator.gather_for_metrics(texts). One object of each process: accelerator.gather_object(...)."
            )
        loader = self._loaders.active
        if loader is not None and loader.joining is not None:
            return self._peers.gather_uneven(None if loader.is_shadow else input_data, as_objects=as_objects)
        gathered = self.gather_object(input_data) if as_objects else self.gather(input_data)
        if loader is None or not loader.end_of_dataloader or loader.remainder <= 0:
            return gathered
        return gathered[: loader.remainder] if as_objects else first_samples(gathered, loader.remainder)

    def gather_object(self, value: Any) -> list[Any]:
        """The objects of all processes: lists one after the other, anything else as one entry of each process.

        Args:
            value: What can be pickled.

        """
        everyone = self._peers.gather_objects(value)
        if all(isinstance(one, list) for one in everyone):
            return [entry for one in everyone for entry in one]
        return everyone

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Tensors of all processes combined element by element, on every process.

        Args:
            tensor: Of the same shape on each process, or a nested structure of such. It stays as it is.
            reduction: ``"sum"``, ``"mean"``, ``"max"``, ``"min"`` or ``"none"``. The mean of integers is a fraction.
            scale: What results are multiplied by.

        Raises:
            ValueError: As ``gather``, or if there is no such reduction.
            TypeError: If there is anything but tensors.

        """
        return self._peers.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        """Tensors as long along one dimension as the longest of any process, so that they can be gathered.

        Args:
            tensor: Of the same shape on each process but for ``dim``, or a nested structure of such.
            dim: Which dimension; may be negative.
            pad_index: The value that is added.
            pad_first: Add before instead of after.

        Raises:
            ValueError: If they differ in more than ``dim``, or lack it; on every process.
            TypeError: If there is anything but tensors.

        """
        return self._peers.pad(tensor, dim, pad_index, first=pad_first)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """The tensors of one process, on every process.

        Args:
            tensor: Of the same shape and dtype on each process, or a nested structure of such. It stays as it is.
            from_process: Whose.

        Raises:
            ValueError: As ``gather``, or if there is no such process.
            TypeError: If there is anything but tensors.

        """
        return self._peers.broadcast(tensor, from_process)

    def broadcast_object_list(self, object_list: list[Any], from_process: int = 0) -> list[Any]:
        """Overwrite a list, in place, with that of one process; it has as many entries on all of them.

        Returns:
            The list.

        Raises:
            ValueError: If there is no such process.

        """
        return self._peers.broadcast_objects(object_list, from_process)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's part of a list, tuple, tensor, dataset, or dictionary of these that are equally long.

        Args:
            inputs: The same on each process; it is left as it is.
            apply_padding: Repeat the last entry so that all parts are equally long, as ``gather`` wants them.

        Raises:
            ValueError: If the values of a dictionary differ in length.
            TypeError: If it is something else.

        """
        yield share(inputs, self.process_index, self.num_processes, pad=apply_padding)

    def set_trigger(self) -> None:
        """Set a flag that every process will see in ``check_trigger``, such as that training is to end."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Whether any process has called ``set_trigger`` since the last time. All processes call this together."""
        self._peers.compare("check_trigger")
        found = self._peers.any(self._triggered)
        self._triggered = False
        return found


def _only_if(condition: bool, function: F) -> F:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if condition else None

    return call  # type: ignore[return-value]
