"""Tests of the memory check for a run's data, and of its messages."""

from pathlib import Path

import pytest

from experiments.launch import dataset
from experiments.launch.dataset import DatasetFacts, dataset_facts
from experiments.launch.settings import DataConfig
from mac import free_memory as memory
from mac.errors import UserError
from mac.free_memory import Memory, free_memory
from mac.types import EnvSpec

GOALS = EnvSpec("toy", obs_dim=99, action_dim=5, goal_dim=20, tasks=(1,), max_steps=9, control_dt=0.05)
HUGE = DatasetFacts(100_100_000, "uint16")  # 20.8 GB of puzzle-4x5
GB = 10**9


def shared(free: float) -> Memory:
    return Memory(int(free * GB), int(free * GB), shared=True)


def gpu(host: float, device: float) -> Memory:
    return Memory(int(host * GB), int(device * GB), shared=False)


def test_bytes_of_a_row():
    assert dataset.window_row_bytes(GOALS, "uint16") == pytest.approx(104 * 2, abs=0.2)
    single = GOALS._replace(goal_dim=None)  # rewards and masks are float32
    assert dataset.window_row_bytes(single, "float32") == pytest.approx(104 * 4 + 8, abs=0.2)


@pytest.mark.parametrize(
    ("free", "resident"),
    [
        (shared(15), "no"),
        (shared(40), "yes"),
        (gpu(128, 139), "yes"),
        (gpu(128, 24), "no"),
        (gpu(16, 139), "no"),  # the rows pass through the host's memory
        (Memory(None, None, shared=True), "yes"),
    ],
)
def test_data_that_fit_are_resident_and_others_take_turns(free: Memory, resident: str):
    decided = dataset.fit_device(DataConfig(), HUGE, GOALS, free)
    assert (decided.resident, decided.dtype) == (resident, "uint16")
    rows, held = dataset.windows(decided, HUGE)
    assert (rows, held) == ((HUGE.rows, 1) if resident == "yes" else (1_001_000, 3))


def test_decision_stands_when_a_run_is_resumed_with_less_memory():
    decided = dataset.fit_device(DataConfig(), HUGE, GOALS, shared(40))
    with pytest.raises(UserError, match=r"\(--data\.resident yes\)"):
        dataset.fit_device(decided, HUGE, GOALS, shared(15))
    assert dataset.fit_device(decided, HUGE, GOALS, shared(60)) == decided


def test_what_does_not_fit_is_one_line_with_the_remedy():
    with pytest.raises(UserError) as caught:
        dataset.fit_device(DataConfig(resident="yes"), DatasetFacts(10**8, "float32"), GOALS, gpu(100, 24))
    assert str(caught.value) == (
        "100,000,000 rows at once (--data.resident yes) need 41.6 GB of device memory, and of 24.0 GB free "
        "18.0 GB may be taken; take --data.resident no, --data.dtype uint16 (half the size)"
    )
    with pytest.raises(UserError, match=r"3 windows of 1,001,000 rows .* take a smaller --data.window$"):
        dataset.fit_device(DataConfig(), HUGE, GOALS, shared(0.7))


def test_free_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path):
    here = free_memory()
    assert here.shared and here.host == here.device and here.host and 0 < here.host < 2**50
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     1000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "group_memory", lambda: [])
    assert memory.free_host_memory() == 1_024_000
    monkeypatch.setattr(memory, "group_memory", lambda: [300_000, 2_000_000])
    assert memory.free_host_memory() == 300_000


def test_rows_that_cannot_be_counted_are_no_fact(tmp_path: Path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"no archive")
    known = dataset_facts(DataConfig(), path)
    assert known.guessed and known.rows == DataConfig().rows
    assert "rows cannot be counted" in dataset.describe_rows(DataConfig(), known)
    assert str(known.rows) not in dataset.describe_rows(DataConfig(), known).replace(",", "")
    assert (
        dataset.describe_rows(DataConfig(), DatasetFacts(1, "float32"))
        == "1 row as float32, all on the device"
    )
    assert not dataset_facts(DataConfig(), path, 5).guessed
