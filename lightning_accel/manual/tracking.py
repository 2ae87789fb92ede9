"""Where metrics go: Lightning's loggers, by name or as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import Logger
from lightning.fabric.utilities.logger import _convert_params

from lightning_accel.manual.choices import nearest

Made = Callable[[str, Path, Mapping[str, Any]], Logger]


def _csv(project: str, folder: Path, arguments: Mapping[str, Any]) -> Logger:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(**{"save_dir": folder, "name": project, **arguments})


def _tensorboard(project: str, folder: Path, arguments: Mapping[str, Any]) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(**{"save_dir": folder, "name": project, **arguments})


def _wandb(project: str, folder: Path, arguments: Mapping[str, Any]) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(**{"save_dir": folder, "project": project, **arguments})


_KINDS: dict[str, tuple[Made, tuple[str, ...]]] = {
    "csv": (_csv, ()),
    "tensorboard": (_tensorboard, ("tensorboard", "tensorboardX")),
    "wandb": (_wandb, ("wandb",)),
}
"""How each is made, and of which packages it needs one."""


def _is_installed(kind: str) -> bool:
    _, packages = _KINDS[kind]
    return not packages or any(find_spec(package) is not None for package in packages)


class Trackers:
    """The loggers of one run. Those of process 0 write; the others' do nothing.

    Args:
        log_with: Names, ``"all"`` for all that are installed, or logger objects; one or several.
        folder: Where those made by name write.

    Raises:
        ValueError: If there is none of a name, or it needs a package that is not installed.
        TypeError: If something is neither a name nor a logger.

    """

    def __init__(self, log_with: Any, folder: Path | None) -> None:
        several = isinstance(log_with, Sequence) and not isinstance(log_with, str)
        asked = [] if log_with is None else list(log_with) if several else [log_with]
        if "all" in asked:
            asked = [kind for kind in _KINDS if _is_installed(kind)] + [e for e in asked if not isinstance(e, str)]
        for entry in asked:
            _require_known(entry)
        if folder is None and any(isinstance(entry, str) for entry in asked):
            raise ValueError(
                f"Expected project_dir or logging_dir with log_with={log_with!r}, which says where it is to write."
            )
        self._asked = asked
        self._folder = folder
        self._loggers: dict[str, Logger] = {}

    @property
    def loggers(self) -> list[Logger]:
        """Those that were started."""
        return list(self._loggers.values())

    def start(self, project: str, config: Mapping[str, Any] | None, arguments: Mapping[str, Mapping[str, Any]]) -> None:
        """Start the loggers.

        Args:
            project: The name of the project.
            config: Hyperparameters to note.
            arguments: For the loggers' constructors, by the loggers' names.

        Raises:
            ValueError: If there are arguments for a logger that was not asked for.

        """
        names = [entry for entry in self._asked if isinstance(entry, str)]
        if unknown := [name for name in arguments if name not in names]:
            raise ValueError(
                f"Expected init_kwargs for loggers that log_with names ({', '.join(names) or 'none'}), got"
                f" {', '.join(unknown)}.{nearest(unknown[0], names)}"
            )
        self._loggers = {}
        for entry in self._asked:
            if isinstance(entry, str):
                assert self._folder is not None
                make, _ = _KINDS[entry]
                self._loggers[entry] = make(project, self._folder, arguments.get(entry, {}))
            else:
                self._loggers[_free_name(entry, self._loggers)] = entry
        for name, logger in self._loggers.items() if config else ():
            try:
                logger.log_hyperparams(_convert_params(dict(config or {})))
            except NotImplementedError:  # Fabric's CSVLogger
                warnings.warn(
                    f"{name} notes no hyperparameters, so config is not in it. Lightning's loggers of the same name"
                    " (lightning.pytorch.loggers) do.",
                    stacklevel=3,
                )

    def log(self, values: Mapping[str, Any], step: int | None, arguments: Mapping[str, Mapping[str, Any]]) -> None:
        """Note metrics.

        Args:
            values: Numbers, or tensors of one element, by name.
            step: When; the loggers count by themselves if None.
            arguments: For the loggers' ``log_metrics``, by the loggers' names.

        Raises:
            RuntimeError: If loggers were asked for and not started.
            ValueError: If a value is no number.

        """
        if self._asked and not self._loggers:
            raise RuntimeError("Expected accelerator.init_trackers('name') before accelerator.log(...).")
        metrics = {name: _number(name, value) for name, value in values.items()}
        for name, logger in self._loggers.items():
            logger.log_metrics(metrics, step, **arguments.get(name, {}))

    def find(self, name: str) -> Logger:
        """A logger that was started, by its name: that given to ``log_with``, or its class's.

        Raises:
            ValueError: If there is none.

        """
        if name in self._loggers:
            return self._loggers[name]
        raise ValueError(
            f"Expected a tracker that was started ({', '.join(self._loggers) or 'none was: call init_trackers'}), got"
            f" {name!r}.{nearest(name, self._loggers)}"
        )

    def end(self) -> None:
        """Write what is left, and close."""
        for logger in self.loggers:
            logger.save()
            logger.finalize("success")
        self._loggers = {}


def _require_known(entry: Any) -> None:
    if isinstance(entry, Logger):
        return
    if not isinstance(entry, str):
        raise TypeError(
            f"Expected log_with to be names ({', '.join(_KINDS)}, all) or Lightning's loggers, got"
            f" {type(entry).__name__}."
        )
    if entry not in _KINDS:
        raise ValueError(
            f"Expected log_with to be one of {', '.join(_KINDS)}, all, or a logger object, got"
            f" {entry!r}.{nearest(entry, [*_KINDS, 'all'])}"
        )
    if not _is_installed(entry):
        raise ValueError(f"Expected the package {_KINDS[entry][1][0]!r} to be installed for log_with={entry!r}.")


def _free_name(logger: Logger, taken: Mapping[str, Logger]) -> str:
    name, number = type(logger).__name__, 1
    while name in taken:
        number += 1
        name = f"{type(logger).__name__}_{number}"
    return name


def _number(name: str, value: Any) -> Any:
    if hasattr(value, "item"):
        if getattr(value, "numel", lambda: 1)() != 1:
            raise ValueError(f"Expected numbers to log, got a tensor of shape {list(value.shape)} as {name!r}.")
        return value.item()
    return value
