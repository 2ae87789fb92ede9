"""Step time against bandwidth: the table, the files, and that what is sent costs what the network has for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import network
from benchmarks.hosts import Hosts
from benchmarks.network import UNLIMITED, by_rate, cells, titles
from benchmarks.result import PeerResult

MBIT = 50.0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        with Hosts(2):
            pass
    except OSError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("network")
    arguments = ["--model", "gpt-tiny", "--rounds", "2", "--mbit", str(MBIT), "--out", str(out)]
    assert network.main([*arguments, "--peers", "torch_ddp,accel_zero2"]) == 0
    return out


@pytest.mark.matrix
def test_files_are_written(written: Path) -> None:
    run, *peers = [json.loads(line) for line in (written / "network.jsonl").read_text().splitlines()]
    assert run["network"] == {"hosts": 2, "rates": [MBIT, UNLIMITED], "delay_ms": 0.0}
    assert run["command"].startswith("python -m benchmarks.network")
    assert [peer["status"] for peer in peers] == ["valid", "valid"]
    assert all(len(peer["seconds"][rate]) == 2 for peer in peers for rate in ("50.0", UNLIMITED))
    page = (written / "network.md").read_text()
    assert "| peer | wire MiB | 50 Mbit/s | unlimited | losses |" in page
    assert (written / "network.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.matrix
def test_no_step_is_quicker_than_the_network_allows(written: Path) -> None:
    """The kernel holds bytes back: that is no matter of how fast this machine is."""
    _, *peers = [json.loads(line) for line in (written / "network.jsonl").read_text().splitlines()]
    for peer in peers:
        # The bucket lets its content pass at once, in each of the steps it may have filled up again; 2 steps a visit.
        seconds = (max(peer["wire"]) - 2**18) * 8 / (MBIT * 1e6)
        assert min(peer["seconds"][str(MBIT)]) > seconds > 0.04


def test_seconds_by_rate() -> None:
    result = PeerResult("a", "accel", "", seconds=[1.0, 2.0, 3.0, 1.5, 2.5, 3.5], wire=[2.0**20, 2.0**21])
    rates = [300.0, 1000.0, UNLIMITED]
    assert by_rate(result, rates) == {300.0: [1.0, 1.5], 1000.0: [2.0, 2.5], UNLIMITED: [3.0, 3.5]}
    assert titles(rates) == ["peer", "wire MiB", "300 Mbit/s", "1 Gbit/s", "unlimited", "losses"]
    assert cells(result, rates) == ["a", "2.0", "1250", "2250", "3250", "ok"]
    assert cells(PeerResult("b", "torch", "", obstacle="no"), rates) == ["b", "-", "-", "-", "-", "not run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "torch_dpd"], "Unknown peer: torch_dpd"),
        (["--ranks", "3"], "as many ranks on each host, got 3 ranks and 2 hosts"),
        (["--mbit", "--no-unlimited"], "leaves nothing to measure"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        network.main(arguments)
    assert message in capsys.readouterr().err
