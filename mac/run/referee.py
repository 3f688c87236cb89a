"""The small process beside process 0 of a run on several hosts: what must outlive any one of them.

    python mac/run/referee.py PORT COUNT SECONDS

It holds the coordination service of JAX, which aborts every process when that is gone, and a connection to
each process. The system closes the connection of a process that dies, however it dies; the others are told.
Over the connections processes also exchange small values (`mac.run.hosts`). It ends with the last of them.
Started as a file, so that it imports nothing of ours.
"""

import json
import os
import signal
import socket
import struct
import sys
import threading
import time

HEAD = struct.Struct("!cI")
"""Of a message: its kind, and the length of what follows."""
JOIN, VALUE, BYE = b"J", b"V", b"B"
"""Kinds that processes send: who they are, a value to exchange, and that they end in good order."""
START, ALL, LOST, REFUSED = b"S", b"A", b"L", b"R"
"""Kinds that they are sent: the service's port, the values of all, who died, and why they cannot join."""


def send(connection: socket.socket, kind: bytes, body: bytes = b"") -> None:
    """Sends a message.

    Raises:
        OSError: the connection is broken.
    """
    connection.sendall(HEAD.pack(kind, len(body)) + body)


def receive(connection: socket.socket) -> tuple[bytes, bytes]:
    """Returns the next message's kind and body.

    Raises:
        OSError: the connection is broken, or was closed.
    """
    kind, length = HEAD.unpack(_read(connection, HEAD.size))
    return kind, _read(connection, length)


def _read(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionResetError("closed")
        data += part
    return data


def watch_for_lost_hosts(connection: socket.socket) -> None:
    """Lets the system find out within a minute that the machine at the other end is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Referee:
    """Connections to all processes, by number, and the values of the current exchange."""

    def __init__(self, count: int):
        self.count = count
        self.connections: dict[int, socket.socket] = {}
        self.values: dict[int, bytes] = {}
        self.lock = threading.Lock()

    def join(self, connection: socket.socket) -> None:
        """Takes in a process, unless another has its number or it was told another count."""
        watch_for_lost_hosts(connection)
        try:
            _, body = receive(connection)
            asked = json.loads(body)
            number, count = asked["number"], asked["count"]
            if count != self.count:
                return send(connection, REFUSED, f"process 0 was started as one of {self.count}".encode())
            if number in self.connections:
                return send(connection, REFUSED, f"another process is number {number} too".encode())
        except (OSError, ValueError, KeyError):
            return connection.close()
        self.connections[number] = connection

    def follow(self, number: int) -> None:
        """Listens to a process until it ends."""
        connection, in_order = self.connections[number], False
        try:
            while not in_order:
                kind, body = receive(connection)
                in_order = kind == BYE
                if kind == VALUE:
                    self._exchange(number, body)
        except OSError:
            pass
        with self.lock:
            del self.connections[number]
            if not in_order:
                self._tell(LOST, str(number).encode())
            if not self.connections:
                os._exit(0)

    def _exchange(self, number: int, value: bytes) -> None:
        with self.lock:
            self.values[number] = value
            if len(self.values) == self.count:
                parts = [self.values[k] for k in range(self.count)]
                self._tell(ALL, b"".join(struct.pack("!I", len(part)) + part for part in parts))
                self.values = {}

    def _tell(self, kind: bytes, body: bytes) -> None:
        for connection in self.connections.values():
            try:
                send(connection, kind, body)
            except OSError:
                continue  # its own thread notices


def free_port() -> int:
    """Returns a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def main(port: int, count: int, patience: float) -> None:
    """Serves one run; prints `ready`, or the reason why it cannot."""
    # Schedulers send these to every process of a job; it must stay until those of the run have ended.
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    try:
        server = socket.create_server(("", port), backlog=count)
    except OSError as error:
        print(error.strerror, flush=True)
        return
    print("ready", flush=True)
    referee, limit = Referee(count), time.monotonic() + patience
    while len(referee.connections) < count:
        server.settimeout(max(limit - time.monotonic(), 0.01))
        try:
            referee.join(server.accept()[0])
        except TimeoutError:
            missing = sorted(set(range(count)) - set(referee.connections))
            names = ", ".join(map(str, missing))
            referee._tell(REFUSED, f"no connection from process {names} of {count}".encode())
            return
    server.close()
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    at = free_port()
    service = _jax.get_distributed_runtime_service(
        f"[::]:{at}", count, heartbeat_timeout=600, cluster_register_timeout=600, shutdown_timeout=10
    )
    with referee.lock:
        referee._tell(START, str(at).encode())
    for number in tuple(referee.connections):
        threading.Thread(target=referee.follow, args=(number,)).start()
    threading.Event().wait()
    del service


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
