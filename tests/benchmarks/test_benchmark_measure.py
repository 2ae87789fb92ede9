"""That the probes count what is really there."""

import gc
import socket

import torch
from torch import nn

from benchmarks.measure import census, sent_bytes


def test_sent_bytes_counts_this_process_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        with sender, receiver:
            before = sent_bytes()
            sender.sendall(b"x" * 100_000)
            received = 0
            while received < 100_000:
                received += len(receiver.recv(65536))
            assert sent_bytes() - before == 100_000


def _alive() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def test_census_tells_the_kinds_apart() -> None:
    others = _alive()
    module = nn.Linear(64, 32)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    buffer = torch.empty(1000)
    size = 4 * (64 * 32 + 32)
    found = census(module=module, optimizers=[optimizer], ignore=others, unseen=7)
    steps = 4 * 2  # one fp32 step count for each of the two parameters
    assert found == {
        "parameters": size,
        "gradients": size,
        "optimizer": 2 * size + steps,
        "other": buffer.untyped_storage().nbytes() + 7,
    }


def test_census_counts_a_storage_once() -> None:
    others = _alive()
    flat = torch.zeros(100)
    module = nn.Module()
    module.first, module.second = nn.Parameter(flat[:30]), nn.Parameter(flat[30:60])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found = census(module=module, optimizers=[optimizer], ignore=others)
    assert found == {"parameters": 400, "gradients": 0, "optimizer": 0, "other": 0}
