"""`vilu serve` in the foreground: start a server, wait for its first answer, restart it where that is asked for."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque

from vilu.errors import FailedError, UserError
from vilu.serving.answers import DeadlineExceeded, ServerUnavailable
from vilu.serving.server import PROBE_TIMEOUT, Server
from vilu.serving.tritonserver import describe_version

PROBE_SECONDS = 3.0  # of a supervised server: a stop of its answers is seen within 10 s
RESTARTS, RESTART_SECONDS = 5, 60


def serve(server: Server, *, supervise: bool = False) -> int:
    """Run a server in the foreground: SIGTERM and SIGINT stop it; returns its exit code.

    Args:
        supervise: restart the server when it ends, or when a process of a Python model dies or it stops answering;
            only requests in flight are lost. After RESTARTS of them within RESTART_SECONDS it gives up.

    Raises:
        UserError: as `Server` does.
    """
    stopping = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    restarts: deque[float] = deque()
    proven = False  # it has answered: what ends it now is no mistake of the user's
    try:
        while True:
            code, fault, answered = _serve_once(server, stopping, supervise, proven)
            proven |= answered
            if stopping.is_set() or (answered and not supervise):
                return code
            restarts.append(time.monotonic())
            while restarts[0] < time.monotonic() - RESTART_SECONDS:
                restarts.popleft()
            if len(restarts) > RESTARTS:
                raise FailedError(f"tritonserver: {fault}; gave up after {RESTARTS} restarts in {RESTART_SECONDS} s")
            print(f"tritonserver: {fault}; restarting it", file=sys.stderr, flush=True)
    finally:
        server.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _serve_once(
    server: Server, stopping: threading.Event, supervise: bool, proven: bool
) -> tuple[int, str, bool]:  # fmt: skip
    """Start, run until something ends it, stop: (exit code, what ended it, whether it has answered).

    Raises:
        UserError: it does not start, and supervision has not seen it do so before (`proven`).
    """
    server.start()
    assert server.process is not None
    waiter = _Waiter(server, stopping)
    waiter.start()
    fault, checked, unanswered, done = "", time.monotonic(), 0, 0
    while server.process.poll() is None and not fault and not stopping.wait(0.2):
        if waiter.error is not None:
            fault = str(waiter.error)
        elif not supervise:
            continue
        # Before its first answer, too: a server one of whose models has died then never gives one.
        elif dead := server.dead_stubs():
            fault = f"a model's process died, {dead[0]}"
        elif waiter.answered and time.monotonic() - checked > PROBE_SECONDS:
            before, done = done, server.inferences()
            unanswered = 0 if _well(server) or done > before else unanswered + 1
            if unanswered == 2 and server.process.poll() is None:
                fault = "it does not answer"
            checked = time.monotonic()
    again = supervise and (proven or server.stub_died_loading)
    if waiter.error is not None and not again:
        raise waiter.error
    ended = server.process.poll()
    if ended is not None and not waiter.answered and not stopping.is_set() and not again and not server.start_again():
        raise FailedError(f"tritonserver ended at start with code {ended}{server.log_hint()}")
    code = server.stop(seconds=1 if fault else None) or 0
    return code, fault or f"it ended with code {code}", waiter.answered


def _well(server: Server) -> bool:
    try:
        return server.answers(timeout=PROBE_TIMEOUT)
    except Exception as error:
        # A full queue is not a fault: a server must not be restarted for being busy.
        return isinstance(error, ServerUnavailable) and not isinstance(error, DeadlineExceeded)


class _Waiter(threading.Thread):
    """Waits for the first answer beside the signal loop, so that a stop during start-up is not held up."""

    def __init__(self, server: Server, stopping: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.stopping = server, stopping
        self.process = server.process
        self.answered = False
        self.error: UserError | None = None

    def run(self) -> None:
        try:
            self.server.wait_until_answering()
            if self.server.process is not self.process:
                return  # it was restarted meanwhile, and has another to wait for it
            self.answered = True
            if version := self.server.version():
                print(describe_version(version, guarded=False), file=sys.stderr, flush=True)
            print(
                f"serving {self.server.repository}: gRPC {self.server.grpc_url}, HTTP {self.server.http_url}",
                file=sys.stderr,
                flush=True,
            )
        except UserError as error:
            mine = self.server.process is self.process
            if mine and not self.stopping.is_set() and self.process and self.process.poll() is None:
                self.error = error
