"""Rendezvous: every process of a run holds a TCP connection to process 0 from start to end.

The kernel closes the connections of a process that dies, however it dies: the others know at once
which one it is. A process that is only stopped stays connected (the watchdog,
lm/reliability/watchdog.py, finds it), and a machine that vanishes is found by TCP keepalive in
about a minute. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lm.exit_codes import Exit, RunError


class PeerLost(RunError):
    """A process of the run never came, or died."""

    code = Exit.PEER_LOST


class Mismatch(RunError):
    """The processes of a run differ in their config, code or number."""

    code = Exit.MISMATCH


@dataclasses.dataclass(frozen=True)
class PeerLoss:
    """A process that ended early; `code` is None if it did not announce its exit."""

    process: int
    code: int | None = None
    message: str = ""

    def __str__(self) -> str:
        if self.code is None:
            return f"process {self.process} went away: it was killed, or its machine is gone"
        name = f" ({Exit(self.code).name})" if self.code in list(Exit) else ""
        said = f": {self.message.removeprefix('error: ').strip()}" if self.message else ""
        return f"process {self.process} ended with exit code {self.code}{name}{said}"

    def error(self) -> PeerLost:
        """The error that ends the others, with the code of the cause: a launcher may read any."""
        error = PeerLost(str(self))
        if self.code in list(Exit):
            error.code = Exit(self.code)
        return error


class PeerConnections:
    """The connections of this process: to all others in process 0, to process 0 elsewhere."""

    def __init__(
        self, process_id: int, links: Mapping[int, socket.socket], service_port: int
    ) -> None:
        self.process_id, self.service_port = process_id, service_port
        self._links = dict(links)
        self._received = dict.fromkeys(links, b"")
        self._left: set[int] = set()  # processes that announced their exit or died
        self._closed: set[int] = set()  # processes from which nothing will come any more
        self._losses: dict[int, PeerLoss] = {}
        self._changed = threading.Condition()

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Start listening to the others; `on_loss` is called in that thread at the first loss."""
        self._on_loss = on_loss
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def loss(self, wait: float = 0.0) -> PeerLoss | None:
        """The first loss within `wait` seconds, or None."""
        with self._changed:
            self._changed.wait_for(lambda: self._losses, wait)
            known = list(self._losses.values())
        # a process that ended because it lost another one is no cause
        causes = [loss for loss in known if loss.code != Exit.PEER_LOST]
        return next(iter(causes or known), None)

    def announce_exit(self, code: int, message: str, *, wait: float) -> None:
        """Tell the others; an empty message means that all processes have come to the end.

        Process 0, on which the others depend, waits up to `wait` seconds for their exits.
        """
        for link in self._links.values():
            _send(link, {"exit": code, "message": message})
        if self.process_id == 0:
            with self._changed:
                self._changed.wait_for(lambda: self._left >= self._links.keys(), wait)

    def close(self, *, wait: float) -> None:
        """Send nothing any more. Process 0 waits up to `wait` seconds for the others to do so."""
        if self.process_id == 0:
            with self._changed:
                self._changed.wait_for(lambda: self._closed >= self._links.keys(), wait)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)

    def _read(self, process: int) -> bool:
        """Handle the messages of a process; False once its connection has ended."""
        try:
            data = self._links[process].recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            if process not in self._left:
                self._add_loss(PeerLoss(process))
            with self._changed:
                self._closed.add(process)
                self._changed.notify_all()
            return False
        *lines, self._received[process] = (self._received[process] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "lost" in message:
                self._add_loss(PeerLoss(**message["lost"]))
            elif message["message"]:
                self._add_loss(PeerLoss(process, message["exit"], message["message"]))
            else:
                self._add_left(process)
        return True

    def _add_left(self, process: int) -> None:
        with self._changed:
            self._left.add(process)
            self._changed.notify_all()

    def _add_loss(self, loss: PeerLoss) -> None:
        with self._changed:
            first = not self._losses
            self._losses.setdefault(loss.process, loss)
        if self.process_id == 0:  # the others see only this process
            for process, link in self._links.items():
                if process != loss.process:
                    _send(link, {"lost": dataclasses.asdict(loss)})
        self._add_left(loss.process)
        if first:
            self._on_loss()


def connect_peers(
    coordinator: str,
    num_processes: int,
    process_id: int,
    *,
    timeout: float,
    serve: Callable[[], int],
) -> PeerConnections:
    """Connect all processes of the run.

    coordinator: HOST:PORT of process 0. timeout: seconds to wait for the others. serve: called in
    process 0 once all are connected; starts the coordination service and returns its port, which
    the others receive.

    Raises:
        PeerLost: processes didn't come in time; lists them.
        Mismatch: two processes claim one id, or were started with different counts.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if process_id:
        link, service_port = _join((host, int(port)), num_processes, process_id, timeout)
        return PeerConnections(process_id, {0: link}, service_port)
    links = _gather(int(port), num_processes, timeout)
    service_port = serve()
    for link in links.values():
        _send(link, {"service_port": service_port})
    return PeerConnections(process_id, links, service_port)


def _gather(port: int, num_processes: int, timeout: float) -> dict[int, socket.socket]:
    deadline = time.monotonic() + timeout
    links: dict[int, socket.socket] = {}
    with _listener(port) as listener:
        while not _complete(links, num_processes):
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                link, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, num_processes)) - links.keys())
                _refuse(
                    links,
                    PeerLost(
                        f"{_processes(missing)} of {num_processes} never came "
                        f"(waited {timeout:g} s; see --peer-timeout)"
                    ),
                )
            hello = _receive(link, 5.0)
            if hello is None or not hello.keys() >= {"hello", "of"}:
                link.close()  # a port scanner, or a health check
                continue
            process = hello["hello"]
            if process in links and _is_closed(links[process]):
                links.pop(process).close()  # it was started again
            twice = process in links or process == 0
            links[-1 if twice else process] = link
            if twice:
                _refuse(links, Mismatch(f"two processes have --process-id={process}"))
            if hello["of"] != num_processes:
                _refuse(
                    links,
                    Mismatch(
                        f"process 0 was started as one of {num_processes} processes, "
                        f"process {process} as one of {hello['of']}: see --num-processes"
                    ),
                )
            _keep_alive(link)
    return links


def _complete(links: dict[int, socket.socket], num_processes: int) -> bool:
    """True if all are connected; those that came and died are dropped and may come again."""
    if len(links) == num_processes - 1:
        for process in [p for p, link in links.items() if _is_closed(link)]:
            links.pop(process).close()
    return len(links) == num_processes - 1


def _join(
    address: tuple[str, int], num_processes: int, process_id: int, timeout: float
) -> tuple[socket.socket, int]:
    """(connection to process 0, port of the coordination service)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            link = socket.create_connection(address, timeout=5.0)
        except OSError:  # not started, or its name is not known yet
            time.sleep(0.2)
            continue
        _keep_alive(link)
        _send(link, {"hello": process_id, "of": num_processes})
        answer = _receive(link, timeout + 10.0)  # process 0 itself waits as long for the others
        if answer is not None and "service_port" in answer:
            return link, answer["service_port"]
        link.close()
        if answer is not None and "refused" in answer:
            kind = Mismatch if answer["code"] == Exit.MISMATCH else PeerLost
            raise kind(answer["refused"])
        time.sleep(0.5)  # somebody else on that port, such as what is left of the last run
    raise PeerLost(
        f"process 0 of {num_processes} doesn't answer at {address[0]}:{address[1]} "
        f"(waited {timeout:g} s; see --coordinator and --peer-timeout)"
    )


def _listener(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise ValueError(f"process 0 cannot listen on port {port}: {error.strerror}") from error


def _refuse(links: Mapping[int, socket.socket], error: RunError) -> NoReturn:
    for link in links.values():
        _send(link, {"refused": str(error), "code": error.code})
    raise error


def _processes(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"process {shown}" if len(ids) == 1 else f"processes {shown}"


def _is_closed(link: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        try:
            return not link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except ConnectionError:
            return True
    return False


def _keep_alive(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # macOS names the first one otherwise
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(link: socket.socket, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # a process that doesn't listen any more will be lost
        link.sendall(json.dumps(message).encode() + b"\n")


def _receive(link: socket.socket, timeout: float) -> dict[str, Any] | None:
    """The first line received; None: nothing in time, a closed connection, or no JSON object."""
    link.settimeout(timeout)
    try:
        with link.makefile("rb", buffering=0) as file:  # it reads no byte of what follows the line
            message = json.loads(file.readline(1 << 16))
    except (OSError, ValueError):
        return None
    finally:
        with contextlib.suppress(OSError):
            link.settimeout(None)
    return message if isinstance(message, dict) else None
