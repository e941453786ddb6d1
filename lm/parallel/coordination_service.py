"""JAX's coordination service in a process of its own, which outlives process 0.

A client of the service aborts its process, with SIGABRT and a page of stack, when the service is
gone; jaxlib has no callback for that which works in Python. The other processes learn of the loss
of process 0 from their connections (rendezvous.py), and this process gives them the time to end in
order. It needs only jaxlib.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

# JAX's own heartbeats would end a run for a process that is only stopped, before the watchdog has
# written the stacks; dead processes and machines are found by their connections.
HEARTBEAT = 600
LINGER = 45.0  # seconds for which the service outlives process 0: more than process_group.GRACE


class CoordinationService:
    """The service for `num_processes`, started by process 0, on a free port of its machine."""

    def __init__(self, num_processes: int, shutdown_timeout: int) -> None:
        """Raises RuntimeError where it doesn't start."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(num_processes), str(shutdown_timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a reader of this process's must not wait for its end
            start_new_session=True,  # no signal of the terminal
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        port = self._process.stdout.readline()
        if not port:
            raise RuntimeError("JAX's coordination service doesn't start")
        self.port = int(port)

    def shutdown(self) -> None:
        """End it, once all clients have disconnected."""
        try:
            self._process.communicate("done\n", timeout=LINGER)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _serve(num_processes: int, shutdown_timeout: int) -> None:
    """Serve until a line comes from process 0, or until LINGER seconds after its death."""
    from jaxlib import _jax as runtime  # pyright: ignore[reportAttributeAccessIssue]

    for number in (signal.SIGINT, signal.SIGTERM):  # of a cluster, to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    service = runtime.get_distributed_runtime_service(
        f"[::]:{port}",
        num_processes,
        heartbeat_timeout=HEARTBEAT,
        shutdown_timeout=shutdown_timeout,
    )
    print(port, flush=True)
    if sys.stdin.readline():
        service.shutdown()
    else:
        time.sleep(LINGER)
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
