"""Metadata of torch.distributed.checkpoint is read, and nothing that it asks for is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lightning_accel.core.checkpoint.metadata import METADATA_FILE, parse


def made_by_torch(folder: Path) -> bytes:
    state = {
        "model": {"w": torch.ones(2, 3), "h": torch.ones(4, dtype=torch.bfloat16, requires_grad=True)},
        "list": [torch.zeros(1), "text", 7],
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return (folder / METADATA_FILE).read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    found = parse(made_by_torch(tmp_path), "here")
    kind = found.state_dict_metadata["model.h"]
    assert isinstance(kind, TensorStorageMetadata)
    assert (kind.size, kind.properties.dtype) == ((4,), torch.bfloat16)
    assert kind.properties.requires_grad
    assert found.storage_data[MetadataIndex("model.w", (0, 0))].relative_path == "__0_0.distcp"
    assert found.planner_data["list.1"] == ("list", 1)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hidden(what: Any) -> dict[str, Metadata]:
    """Metadata with something in each of the places that can hold anything."""
    return {
        "planner_data": Metadata({}, planner_data={"a": what}),
        "storage_data": Metadata({}, storage_data={MetadataIndex("a"): what}),
        "state_dict_metadata": Metadata({"a": what}),
        "storage_meta": Metadata({}, storage_meta=what),
    }


@pytest.mark.parametrize("where", hidden(None))
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(where: str, protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(hidden(Touch(tmp_path / "made"))[where], protocol)
    with pytest.raises(ValueError, match=r"it asks for (posix|nt)\.mkdir. Nothing of it was run"):
        parse(content, "here")
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists(), "the test must be able to fail"


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval",
        b"builtins\ngetattr",
        b"torch\nload",
        b"torch\nhub.load",
        b"torch\nserialization.pickle.loads",
        b"torch.serialization\nload",
        b"os\nsystem",
        b"copyreg\n_reconstructor",
        b"functools\npartial",
        b"torch.distributed.checkpoint.metadata\nos",
        b"torch.distributed.checkpoint.metadata\nMetadata.__init__",
    ],
)
def test_nothing_but_descriptions_of_tensors_is_found(name: bytes) -> None:
    with pytest.raises(ValueError, match="Nothing of it was run"):
        parse(b"c" + name + b"\n.", "here")


def test_something_else_is_refused() -> None:
    for content in (b"", b"garbage", pickle.dumps(Metadata({}))[:-3]):
        with pytest.raises(ValueError, match="Expected here to be metadata of torch.distributed.checkpoint"):
            parse(content, "here")
    with pytest.raises(ValueError, match="hold metadata of a checkpoint, got a dict"):
        parse(pickle.dumps({"a": 1}), "here")
