"""Settings in YAML files: our own, and those of Hugging Face Accelerate."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_accel.launching import accelerate_file
from lightning_accel.launching.settings import LaunchSettings

_HEADER = """\
# How accel launch starts scripts. Options on its command line go before what is here.
# Settings have the names of its options: `accel launch --help` says what each means. `accel config` asks for most.
"""


@dataclass(frozen=True)
class Found:
    """What a file says."""

    settings: LaunchSettings
    """What is launched by it."""
    path: Path | None
    """Where it is; None if there is no file and these are the defaults."""
    left_out: tuple[str, ...] = ()
    """What it says in Accelerate's words and cannot be taken over, one sentence for each."""


def default_path() -> Path:
    """The file that is read if no other is named: in the user's folder for such files."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    # The specification of these folders has relative paths ignored.
    folder = Path(home) if os.path.isabs(home) else Path.home() / ".config"
    return folder / "lightning_accel" / "default.yaml"


def read(path: str | Path | None = None) -> Found:
    """The settings in a file of ours or of Accelerate's.

    Args:
        path: Where it is. Default: the user's file, which need not exist.

    Raises:
        ValueError: If it is no such file, or says what is not accepted.
        OSError: If it cannot be read.

    """
    chosen = default_path() if path is None else Path(path)
    if path is None and not chosen.exists():
        return Found(LaunchSettings(), None)
    if chosen.is_dir():
        raise IsADirectoryError(f"Expected a YAML file with settings, got {str(chosen)!r}, which is a folder.")
    try:
        found = yaml.safe_load(chosen.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a YAML file at {chosen}, got one that cannot be read: {error}") from error
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise ValueError(f"Expected names and values in {chosen}, got a {type(found).__name__}.")
    if accelerate_file.is_one(found):
        translated = accelerate_file.translate(found, str(chosen))
        return Found(LaunchSettings.from_mapping(translated.settings, str(chosen)), chosen, translated.left_out)
    return Found(LaunchSettings.from_mapping(found, str(chosen)), chosen)


def write(settings: LaunchSettings, path: str | Path | None = None) -> Path:
    """Write settings that differ from the defaults. The file is there as a whole, or what was there before.

    Args:
        settings: What to write.
        path: Where. Default: the user's file.

    Returns:
        Where it is.

    Raises:
        OSError: If it cannot be written.

    """
    chosen = default_path() if path is None else Path(path)
    chosen.parent.mkdir(parents=True, exist_ok=True)
    _replace(chosen, _HEADER + _dump(settings.changed()))
    return chosen


def _dump(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True) if values else ""


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
