"""Processes of one run: how they find each other, exchange values, and end when one of them dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mac.errors import UserError
from mac.run import hosts
from mac.run.hosts import Place, first_host, parse_place, place_from_environment
from mac.run.referee import free_port

ROOT = Path(__file__).parents[2]
TORCH = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_LOCALID": "1",
}


def test_a_place_is_read_from_the_flag():
    assert parse_place("node1:29500,0,2") == Place("node1", 29500, 0, 2)
    assert parse_place("[::1]:80,1,2") == Place("[::1]", 80, 1, 2)


@pytest.mark.parametrize("text", ["node1", "node1,0,2", "node1:x,0,2", "a:80,2,2", "a:0,0,2", "a:70000,0,2"])
def test_a_bad_place_is_one_line(text: str):
    with pytest.raises(UserError) as error:
        parse_place(text)
    assert f"--hosts={text}" in str(error.value) and "\n" not in str(error.value)


def test_variables_of_torchrun_give_a_place():
    assert place_from_environment(TORCH) == Place("node1", 29500, 3, 4)
    local = TORCH | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert place_from_environment(local) == Place("node1", 29501, 3, 4, 1)


def test_variables_of_slurm_give_a_place():
    port = 20_000 + (8 * 1234 + 2) % 20_000
    assert place_from_environment(SLURM) == Place("gpu003", port, 9, 16, 1)
    whole = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}
    assert place_from_environment(whole) == Place("gpu003", port, 9, 16)


def test_a_lone_process_has_no_place():
    """The script of a job with several tasks is itself no step of them."""
    assert place_from_environment({}) is None
    assert place_from_environment({"WORLD_SIZE": "1"}) is None
    assert place_from_environment({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) is None


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        (TORCH | {"RANK": "x"}, "RANK=x"),
        (TORCH | {"RANK": "4"}, "process 4 of 4"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_bad_variables_are_one_line(env: dict[str, str], named: str):
    with pytest.raises(UserError, match=named):
        place_from_environment(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a,b", "a"), ("gpu[003-005,009],x1", "gpu003"), ("gpu[12,14]", "gpu12")],
)
def test_first_host_of_a_list(nodes: str, first: str):
    assert first_host(nodes) == first


def test_shares_cover_all():
    for total, parts in ((10, 3), (2, 4), (0, 2)):
        found = [i for part in range(parts) for i in range(total)[hosts.share(total, parts, part)]]
        assert found == list(range(total))


def test_a_lone_process_exchanges_with_itself():
    assert (hosts.count(), hosts.number(), hosts.is_first(), hosts.name()) == (1, 0, True, "")
    assert hosts.gather(b"x") == [b"x"] and hosts.from_first({"a": 1}) == {"a": 1}
    hosts.leave(0, agreed=True)


MEMBER = """
import os, signal, sys
from mac.run import hosts
place = hosts.parse_place(sys.argv[1])
hosts.start(place)
if hosts._referee:  # schedulers signal every process of a job
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        hosts._referee.send_signal(each)
said = hosts.gather_json({"number": place.number, "text": "x" * 100_000 * place.number})
assert [each["number"] for each in said] == [0, 1], said
assert len(said[1]["text"]) == 100_000
assert hosts.from_first(place.number + 5) == 5
if sys.argv[2] == str(place.number):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] != "none":
    hosts.gather(b"never comes")
import jax
assert jax.process_count() == 2
hosts.leave(0, agreed=True)
print("left in order")
"""


def pair(words: list[str], who_dies: str) -> list[tuple[int, str, str]]:
    """Status, output and errors of two processes of one run."""
    port, env = free_port(), os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, *words, f"127.0.0.1:{port},{number},2", who_dies],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (1, 0)
    ]  # fmt: skip
    done = [(*each.communicate(timeout=300), each.returncode) for each in running]
    return [(status, out, err) for out, err, status in reversed(done)]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(dead: int):
    """Process 0 too, which would take JAX's own service with it."""
    found = pair(["-c", MEMBER], str(dead))
    assert found[dead][0] == -signal.SIGKILL
    status, _, err = found[1 - dead]
    assert status == hosts.STATUS
    (line,) = err.splitlines()
    assert line.startswith(f"error: process {dead} of 2 ended before the run did") and "--resume" in line


@pytest.mark.slow
def test_processes_leave_in_order():
    assert [(status, out.splitlines()[-1]) for status, out, _ in pair(["-c", MEMBER], "none")] == [
        (0, "left in order")
    ] * 2


def test_a_port_that_is_taken_is_one_line():
    import socket

    with socket.create_server(("", 0)) as server:
        with pytest.raises(UserError, match="choose another port") as error:
            hosts._start_referee(Place("127.0.0.1", server.getsockname()[1], 0, 2))
        assert "\n" not in str(error.value)


def test_nobody_at_the_address_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=r"found no process 0 at 127\.0\.0\.1"):
        hosts._Group(Place("127.0.0.1", free_port(), 1, 2))
