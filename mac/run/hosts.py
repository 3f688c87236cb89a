"""The processes of one run on several hosts: who they are, small values that they exchange, how they end.

Arrays pass between processes inside compiled programs. What is exchanged here are decisions that all must
make alike, and results of evaluations. Every process calls the same functions in the same order. If one dies,
the others end within seconds, with one line (`mac.run.referee`); else they would wait for it forever.
"""

import contextlib
import io
import json
import os
import queue
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mac.errors import UserError, one_line
from mac.run import referee

PATIENCE = 300.0
"""Seconds that processes wait for each other at the start."""
GRACE = 3.0
"""Seconds that a process has to end by itself after another has died, before it is ended."""
STATUS = 3
"""Exit status of a process that ends because another one died."""


class SharedError(UserError):
    """Bad input that all processes notice at the same moment; the first prints it."""


class Place(NamedTuple):
    """One process among those of a run.

    Attributes:
        address, port: where process 0 can be reached.
        number, count: of this process, and how many there are.
        local: its number on its own host, where several share one; None if it has all of the host's devices.
    """

    address: str
    port: int
    number: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    local: int | None = None


def parse_place(text: str) -> Place:
    """Reads `ADDRESS:PORT,NUMBER,COUNT`.

    Raises:
        UserError: it is nothing of that form.
    """
    match = re.fullmatch(r"(.+):(\d+),(\d+),(\d+)", text.strip())
    if match is None:
        raise UserError(f"--hosts={text}: write ADDRESS:PORT,NUMBER,COUNT, such as node1:29500,0,2")
    return _checked(Place(match[1], *map(int, match.groups()[1:])), f"--hosts={text}")


def place_from_environment(env: Mapping[str, str]) -> Place | None:
    """The place that `torchrun`'s variables, or else those of a step of SLURM, give; None of a lone process.

    Raises:
        UserError: one of them is missing or no number.
    """
    if env.get("WORLD_SIZE", "1") != "1":
        count, number = _number(env, "WORLD_SIZE"), _number(env, "RANK")
        # torchrun itself listens at MASTER_PORT.
        port = _number(env, "MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in env)
        local = _number(env, "LOCAL_RANK") if env.get("LOCAL_WORLD_SIZE", "1") != "1" else None
        return _checked(Place(_text(env, "MASTER_ADDR"), port, number, count, local), "WORLD_SIZE, RANK")
    if env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        count, number = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
        job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID")
        several = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0] != "1"
        local = _number(env, "SLURM_LOCALID") if several else None
        address = first_host(_text(env, "SLURM_STEP_NODELIST"))
        port = 20_000 + (8 * job + step) % 20_000
        return _checked(Place(address, port, number, count, local), "SLURM_STEP_NUM_TASKS, SLURM_PROCID")
    return None


def first_host(nodes: str) -> str:
    """Returns the first host of a list in SLURM's form, such as `gpu[003-005,009],login1`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")


def _checked(place: Place, where: str) -> Place:
    if not (place.number < place.count and 0 < place.port < 65536):
        raise UserError(
            f"{where}: process {place.number} of {place.count} at port {place.port}: numbers count from 0, "
            "and ports are below 65536"
        )
    return place


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise UserError(f"{name} is not set, but other variables say that there are several processes")
    return env[name]


def _number(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a whole number")
    return int(text)


# The connection.


class _Group:
    """This process's connection to the referee."""

    def __init__(self, place: Place):
        self.place, self.leaving = place, False
        self.lost: int | None = None
        self.results: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.connection = self._connect()

    def _connect(self) -> socket.socket:
        place, limit = self.place, time.monotonic() + PATIENCE
        while True:
            try:
                connection = socket.create_connection((place.address, place.port), timeout=10.0)
                break
            except OSError as error:
                if time.monotonic() > limit:
                    raise UserError(
                        f"{self.name} found no process 0 at {place.address}:{place.port} within "
                        f"{PATIENCE:.0f} s ({one_line(error)}); start all, and check address and port"
                    ) from error
                time.sleep(0.2)
        referee.watch_for_lost_hosts(connection)
        asked = {"number": place.number, "count": place.count}
        try:
            connection.settimeout(PATIENCE + 60.0)
            referee.send(connection, referee.JOIN, json.dumps(asked).encode())
            kind, body = referee.receive(connection)
        except OSError as error:
            raise UserError(f"{self.name} lost process 0 at the start ({one_line(error)})") from error
        if kind != referee.START:
            raise UserError(f"{self.name} cannot begin: {body.decode()}; start all with the same settings")
        self.service_port = int(body)
        connection.settimeout(None)
        return connection

    @property
    def name(self) -> str:
        return f"process {self.place.number} of {self.place.count}"

    def listen(self) -> None:
        """Takes what the referee sends; runs in a thread."""
        try:
            while True:
                kind, body = referee.receive(self.connection)
                if kind == referee.ALL:
                    self.results.put(body)
                elif kind == referee.LOST and self.lost is None:
                    self.lost = int(body)
                    threading.Thread(target=self._end, daemon=True).start()
        except OSError:
            if not self.leaving and self.lost is None:
                self.lost = 0
                self._end()

    def _end(self) -> None:
        time.sleep(GRACE)
        if self.leaving:
            return
        # One line is enough: that of the first process that is left.
        if self.place.number == (1 if self.lost == 0 else 0):
            line = (
                f"error: process {self.lost} of {self.place.count} ended before the run did, so all stop; "
                "see what it printed; continue with --resume\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
        os._exit(STATUS)


_group: _Group | None = None
_referee: subprocess.Popen[str] | None = None


def start(place: Place) -> None:
    """Connects this process with the others, and JAX with theirs; before JAX starts.

    Raises:
        UserError: they are not found, or do not fit.
    """
    global _group
    import jax

    if place.number == 0:
        _start_referee(place)
    _group = group = _Group(place)
    threading.Thread(target=group.listen, daemon=True).start()
    with contextlib.suppress(AttributeError):  # it would take SIGTERM for itself
        jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    own = [] if place.local is None or (visible and "," not in visible) else [place.local]
    jax.distributed.initialize(
        f"{place.address}:{group.service_port}",
        place.count,
        place.number,
        local_device_ids=own or None,
        cluster_detection_method="deactivate",
        # Process 0 would hold the service, and all would be aborted with it; this one nobody uses.
        coordinator_bind_address=f"127.0.0.1:{referee.free_port()}",
        initialization_timeout=int(PATIENCE),
        heartbeat_timeout_seconds=600,
        shutdown_timeout_seconds=10,
    )


def _start_referee(place: Place) -> None:
    words = [sys.executable, str(Path(referee.__file__)), str(place.port), str(place.count), str(PATIENCE)]
    global _referee
    _referee = process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    with process.stdout as stream:
        said = stream.readline().strip()
    if said != "ready":
        process.wait()
        raise UserError(f"process 0 cannot listen at port {place.port} ({said}); choose another port")


# What every process may ask.


def count() -> int:
    """Returns the number of processes of this run; 1 unless `start` was called."""
    return 1 if _group is None else _group.place.count


def number() -> int:
    """Returns the number of this process."""
    return 0 if _group is None else _group.place.number


def is_first() -> bool:
    """True of the process that prints and writes."""
    return number() == 0


def name() -> str:
    """Returns a prefix for errors of one process among several, such as `process 1 of 2: `; else nothing."""
    return "" if _group is None or is_first() else f"{_group.name}: "


def gather(value: bytes) -> list[bytes]:
    """Returns the values of all processes, by number; waits for all of them."""
    if _group is None:
        return [value]
    with contextlib.suppress(OSError):  # whoever listens notices, and ends this process
        referee.send(_group.connection, referee.VALUE, value)
    while True:
        with contextlib.suppress(queue.Empty):  # a wait without end would not notice Ctrl-C
            return _parts(_group.results.get(timeout=0.5))


def _parts(body: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(body):
        (length,) = struct.unpack_from("!I", body, at)
        found.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def gather_json(value: Any) -> list[Any]:
    """Does what `gather` does, for what JSON can hold."""
    return [value] if _group is None else [json.loads(x) for x in gather(json.dumps(value).encode())]


def from_first(value: Any) -> Any:
    """Returns the value that process 0 gave; what JSON can hold."""
    return value if _group is None else gather_json(value if is_first() else None)[0]


def gather_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Does what `gather` does, for named arrays."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return [dict(np.load(io.BytesIO(each))) for each in gather(file.getvalue())]


def share(total: int, parts: int, part: int) -> slice:
    """Returns which of `total` things are those of one of `parts` parts; their sizes differ by 1 at most."""
    return slice(part * total // parts, (part + 1) * total // parts)


def wait_for_loss() -> None:
    """Gives the news that another process died time to arrive: an error may be due to that."""
    if _group is not None:
        time.sleep(2 * GRACE)


def leave(status: int, *, agreed: bool) -> None:
    """Ends this process's part of the run.

    Args:
        agreed: all processes end in this way; else this one does not return, and the others end too.
    """
    global _group
    if _group is None:
        return
    if agreed:
        import jax

        gather(b"")
        _group.leaving = True
        jax.distributed.shutdown()
        with contextlib.suppress(OSError):
            referee.send(_group.connection, referee.BYE)
            _group.connection.close()
        _group = None
        return
    _group.leaving = True
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
