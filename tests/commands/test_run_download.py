"""A run whose dataset is downloaded: from the command line to the label in its results."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.run import main
from mac.data.sources import http_download
from mac.run.train import TrainJob, TrainResult
from tests.helpers.command_line import SIZES, arrays, error_of
from tests.helpers.faulty_server import Server, closed_port, says, serving

FILE = Path("data/downloads/ogbench/cube-single-play-v0.npz")


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def server() -> Iterator[Server]:
    """Serves the small dataset, under every name."""
    file = io.BytesIO()
    np.savez(file, **arrays())  # pyright: ignore[reportArgumentType]
    with serving(file.getvalue()) as running:
        yield running


def flags(server: Server | None) -> list[str]:
    address = server.url("")[:-1] if server else f"http://127.0.0.1:{closed_port()}"
    data = ["--data.source", "download", "--data.mirror", address]
    return [*SIZES, *data, "--steps", "5", "--out", "o"]


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the first bytes of each file."""

    def blocks(response: Any) -> Iterator[bytes]:
        yield response.raw.read1(3000)
        raise KeyboardInterrupt

    monkeypatch.setattr(http_download, "content_blocks", blocks)


@pytest.mark.usefixtures("quiet", "interrupted")
def test_ctrl_c_in_a_download_is_one_line_and_leaves_a_part(
    server: Server, capsys: pytest.CaptureFixture[str]
):
    assert main(flags(server)) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted; ") and "a download goes on where it was" in line
    part = FILE.with_name(FILE.name + ".part").read_bytes()
    assert not FILE.exists() and 0 < len(part) <= 3000 and server.content.startswith(part)
    assert not Path("o").exists() or not any(Path("o").iterdir())


@pytest.mark.usefixtures("quiet")
def test_a_download_that_fails_is_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(http_download.time, "sleep", lambda seconds: None)
    server.plan(says(404))
    assert "HTTP 404" in error_of(capsys, flags(server))
    assert "seems to be offline" in error_of(capsys, flags(None))
    assert not FILE.exists()


@pytest.mark.slow
def test_a_dry_run_announces_the_download_and_does_nothing(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main([*flags(server), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"to be downloaded from 127.0.0.1:{server.server_address[1]}" in out and "1,001,000 rows" in out
    assert not server.asked and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quiet")
def test_a_run_names_the_mirror_that_its_data_came_from(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Up to where it trains; what it writes from there on is `test_provenance`'s."""
    jobs: list[TrainJob] = []

    def train(job: TrainJob, *_: Any, **__: Any) -> TrainResult:
        jobs.append(job)
        return TrainResult(0, interrupted=2)

    monkeypatch.setattr("experiments.run.train", train)
    assert main(flags(server)) == 130
    label = f"OGBench (mirror 127.0.0.1:{server.server_address[1]})"
    assert [job.data for job in jobs] == [label]
    (launch,) = json.loads(Path("o/run.json").read_text())["launches"]
    assert launch["data"]["label"] == label
    assert launch["data"]["kind"] == "downloaded" and launch["data"]["rows"] == 120
    assert json.loads(Path("o/config.json").read_text())["data"]["source"] == "download"
