"""The door as a process: its listeners, its signals, and the tritonserver behind it where it has one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vilu.errors import FailedError, UserError
from vilu.serving.access import Access
from vilu.serving.address import join_host_port, listen, open_directly, reachable_host
from vilu.serving.door.connections import limit_connections
from vilu.serving.door.core import Core
from vilu.serving.door.grpc_side import GrpcSide
from vilu.serving.door.http_server import HttpServer
from vilu.serving.door.http_side import HttpSide
from vilu.serving.door.keys import Keys
from vilu.serving.door.limits import Limits
from vilu.serving.door.observe import Metrics, Observer
from vilu.serving.door.upstream import Upstream, Upstreams
from vilu.serving.server import Server
from vilu.serving.supervise import RESTART_SECONDS, RESTARTS
from vilu.serving.tokens import CONTROL, GRPC_PREFIX, TOKEN
from vilu.serving.tritonserver import describe_version

if TYPE_CHECKING:
    from vilu.serving.record.recorder import RecordOptions

SILENT_SECONDS = 3.0  # without a server that is well, before it is started again
RELOAD_SECONDS = 2.0  # between looks at the files of tokens and certificates


@dataclass
class Options:
    """How a door listens and whom it lets in.

    Attributes:
        host: address to listen on.
        grpc_port, http_port, metrics_port: 0 picks a free one; None: the protocol is not offered.
        access: reads the tokens and the paths of the TLS files, now and whenever one of `watched` has changed.
        tokens: a file of named tokens.
        access_log: a file, or "-".
        upstreams: URLs of tritonservers that the door does not start.
        upstream_ca: PEM of who signed their certificates.
        record: what is recorded; None for nothing.
    """

    host: str = "127.0.0.1"
    grpc_port: int | None = 8001
    http_port: int | None = 8000
    metrics_port: int | None = 8002
    access: Callable[[], Access] = Access
    tokens: Path | None = None
    watched: Sequence[Path] = ()
    access_log: str | None = None
    upstreams: Sequence[str] = ()
    upstream_ca: Path | None = None
    record: RecordOptions | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass
class Ports:
    """Where a door listens: HOST:PORT of each protocol, None where it is not offered."""

    grpc: str | None = None
    http: str | None = None
    metrics: str | None = None


class Door:
    """Use: `async with Door(options).serving() as ports: ...`.

    Args:
        server: a tritonserver that `own_server` made, started and stopped by the door; None where options.upstreams
            name others.
        supervise: start it again when it, or the process of a model, dies or stops answering.

    Raises:
        UserError: tokens or TLS files that are not what they must be, or an access log that cannot be written.
    """

    def __init__(self, options: Options, server: Server | None = None, *, supervise: bool = False) -> None:
        self.options, self.server, self.supervise = options, server, supervise
        self.keys = Keys(options.access, options.tokens, options.watched)
        self.metrics = Metrics()
        ca = options.upstream_ca.read_bytes() if options.upstream_ca else None
        upstreams = [Upstream(url, ca=ca) for url in options.upstreams]
        if server is not None:
            words = [(GRPC_PREFIX + TOKEN, server.access.token), (GRPC_PREFIX + CONTROL, server.access.control_token)]
            upstreams.append(Upstream(server.grpc_url, [(key, word) for key, word in words if word]))
        self.upstreams = Upstreams(upstreams, options.limits, self.metrics)
        hand_on = server is None and self.keys.open
        self.observer = Observer(self.metrics, options.access_log)
        self.recorder = None
        if options.record is not None:
            from vilu.serving.record.recorder import Recorder

            self.recorder = Recorder(options.record, self.metrics.registry)
        self.core = Core(
            self.upstreams, self.keys, options.limits, self.observer, hand_on=hand_on, before_load=self._before_load,
            recorder=self.recorder,
        )  # fmt: skip
        self.ended: asyncio.Future[int] | None = None
        self.restarts: list[float] = []  # when

    def _before_load(self, model: str) -> None:
        if self.server is not None and self.server.overlay is not None:
            self.server.overlay.refresh(model)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Ports]:
        """Start the server behind, if it is the door's own, and listen; ports are bound before it starts.

        Raises:
            UserError: an address that cannot be listened on, or a server that does not start.
        """
        options, ports = self.options, Ports()
        self.ended = asyncio.get_running_loop().create_future()
        async with contextlib.AsyncExitStack() as stack:  # left from the last to the first: the server ends last
            if self.recorder is not None:
                stack.push_async_callback(asyncio.to_thread, self.recorder.close)
            if self.observer.log is not None:
                stack.push_async_callback(asyncio.to_thread, self.observer.log.close)
            if self.server is not None:
                stack.push_async_callback(asyncio.to_thread, self.server.stop)
            stack.push_async_callback(self.upstreams.close)
            if options.grpc_port is not None:
                port = await stack.enter_async_context(GrpcSide(self.core).serving(options.host, options.grpc_port))
                ports.grpc = join_host_port(reachable_host(options.host), port)
                await stack.enter_async_context(_background(limit_connections(port, options.limits, self.metrics)))
            tls = self.keys.context is not None
            if options.http_port is not None:
                app = HttpSide(self.core)
                ports.http = await stack.enter_async_context(self._http(app, options.http_port, tls))
            if options.metrics_port is not None:
                health = [Route("/healthz", self._health), Route("/readyz", self._health)]
                page = Starlette(routes=[Route("/metrics", self._metrics), *health])
                ports.metrics = await stack.enter_async_context(self._http(page, options.metrics_port, False))
            await stack.enter_async_context(_background(self._reload_when_changed()))
            await stack.enter_async_context(_background(self.upstreams.watch()))
            if self.server is not None:
                await self._start(proven=False)
                await stack.enter_async_context(_background(self._keep()))
            stack.callback(self.core.stop)  # at the end it is the first
            yield ports

    @contextlib.asynccontextmanager
    async def _http(self, app: ASGIApp, port: int, tls: bool) -> AsyncIterator[str]:
        with listen(self.options.host, port) as listener:
            server = HttpServer(app, listener, self.options.limits, self.metrics, self.keys if tls else None)
            running = asyncio.create_task(server.run_on_listener())
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            try:
                yield join_host_port(reachable_host(self.options.host), listener.getsockname()[1])
            finally:
                server.should_exit = True
                await running

    async def _metrics(self, request: Request) -> Response:
        """The door's metrics, and those of the tritonserver behind it."""
        for upstream in self.upstreams.all:
            self.metrics.upstreams.labels(upstream.url).set(upstream.well)
        text = self.metrics.text()
        if self.server is not None:
            url = f"http://127.0.0.1:{self.server.metrics_port}/metrics"
            with contextlib.suppress(OSError):  # it may be starting
                text += await asyncio.to_thread(lambda: open_directly(url, timeout=2).read())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        """As HTTP's own, without TLS, for the probes of a machine that has no certificate."""
        ready = self.core.ready or request.url.path == "/healthz"
        return Response("ok" if ready else "no server answers", 200 if ready else 503)

    def reload(self) -> None:
        """Read tokens and certificates anew; on an error those in force stay, and it is logged."""
        try:
            self.keys.read()
        except UserError as error:
            self.metrics.reloads.labels("refused").inc()
            print(f"vilu: {error}; the tokens and certificates in force stay", file=sys.stderr, flush=True)
        else:
            self.metrics.reloads.labels("ok").inc()

    def hang_up(self) -> None:
        """SIGHUP: read tokens and certificates anew, and open the access log anew."""
        self.reload()
        if self.observer.log is not None:
            self.observer.log.reopen()

    async def _reload_when_changed(self) -> None:
        before = self.keys.stamp()
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            now = self.keys.stamp()
            if now != before:
                before = now
                self.reload()

    # The tritonserver behind

    async def _start(self, *, proven: bool) -> None:
        """Start it, again where a supervised one fails or its own fault ends it, until it answers.

        Args:
            proven: it has answered before, so that no failure is its user's mistake.

        Raises:
            UserError: it does not start.
        """
        assert self.server is not None
        fault = ""
        while True:
            if fault:
                await self._restarting(fault)
            await asyncio.to_thread(self.server.start)
            fault = await self._first_answer()
            died = bool(self.server.dead_stubs())
            if not fault:
                return
            if not (self.supervise and (proven or died)) and not self.server.start_again():
                raise FailedError(f"tritonserver: {fault}{self.server.log_hint()}")

    async def _first_answer(self) -> str:
        """Wait for it; what went wrong, or nothing."""
        assert self.server is not None
        assert self.server.process is not None
        end = time.monotonic() + self.server.startup_seconds
        while not self.upstreams.well:
            if (code := self.server.process.poll()) is not None:
                return f"it ended at start with code {code}"
            if self.supervise and (dead := self.server.dead_stubs()):
                return f"a model's process died, {dead[0]}"
            if time.monotonic() > end:
                fault = self.upstreams.all[-1].fault
                return f"it did not answer in {self.server.startup_seconds:g} s: {fault}"
            await asyncio.sleep(0.1)
        return ""

    async def _restarting(self, fault: str) -> None:
        """Stop it for a new start. Raises UserError where there have been too many."""
        assert self.server is not None
        now = time.monotonic()
        self.restarts = [at for at in self.restarts if at > now - RESTART_SECONDS] + [now]
        if len(self.restarts) > RESTARTS:
            raise FailedError(f"tritonserver: {fault}; gave up after {RESTARTS} restarts in {RESTART_SECONDS} s")
        print(f"tritonserver: {fault}; restarting it", file=sys.stderr, flush=True)
        self.metrics.restarts.inc()
        self.upstreams.all[-1].well = False
        await asyncio.to_thread(self.server.stop, 1)

    async def _keep(self) -> None:
        """Watch over it, and start it again where that is asked for; sets `ended` where it is not, or in vain."""
        assert self.ended is not None
        assert self.server is not None
        try:
            while True:
                fault = await self._until_it_fails()
                if not self.supervise:
                    code = await asyncio.to_thread(self.server.stop, 1)
                    self.ended.set_result(code or 0)
                    return
                await self._restarting(fault)
                await self._start(proven=True)
        except UserError as error:
            self.ended.set_exception(error)

    async def _until_it_fails(self) -> str:
        assert self.server is not None
        assert self.server.process is not None
        silent_since: float | None = None
        while True:
            if (code := self.server.process.poll()) is not None:
                return f"it ended with code {code}"
            if self.supervise:
                if dead := self.server.dead_stubs():
                    return f"a model's process died, {dead[0]}"
                silent_since = None if self.upstreams.well else silent_since or time.monotonic()
                if silent_since is not None and time.monotonic() - silent_since > SILENT_SECONDS:
                    return "it does not answer"
            await asyncio.sleep(0.2)


def own_server(repository: Path, *, flags: Sequence[str] = (), **options: object) -> Server:
    """A tritonserver for a door: on loopback alone, behind random secrets, without queue limits of its own."""
    access = Access(secrets.token_urlsafe(32), secrets.token_urlsafe(32))
    return Server(repository, access=access, flags=flags, overlay=True, **options)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` goes on inside."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def run(door: Door, word: str = "serving") -> int:
    """Serve until SIGTERM, SIGINT or the terminal closes; any other SIGHUP is `Door.hang_up`. Returns the exit code.

    Raises:
        UserError: as `Door.serving`, or a server that failed again and again.
    """

    async def serve() -> int:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        # The kernel sends SIGHUP, too, when the terminal closes; nohup ignores it.
        ends_with_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN

        def hang_up() -> None:
            if ends_with_terminal and not _has_terminal():
                stop.set()
            else:
                door.hang_up()

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        return await _serve(door, stop, word)

    return asyncio.run(serve())


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def _serve(door: Door, stop: asyncio.Event, word: str) -> int:
    stopped = asyncio.create_task(stop.wait())
    context = door.serving()
    entering = asyncio.create_task(context.__aenter__())
    either: set[asyncio.Future[Any]] = {entering, stopped}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not entering.done():  # stopped while the server starts
        entering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await entering
        return 0
    ports = entering.result()
    try:
        behind = str(door.server.repository) if door.server else ", ".join(door.options.upstreams)
        tls = door.keys.context is not None
        places = [f"gRPC {'grpcs://' if tls else ''}{ports.grpc}" if ports.grpc else ""]
        places += [f"HTTP http{'s' if tls else ''}://{ports.http}" if ports.http else ""]
        places += [f"metrics http://{ports.metrics}/metrics" if ports.metrics else ""]
        if door.server is not None and (version := await asyncio.to_thread(door.server.version)):
            print(describe_version(version, guarded=True), file=sys.stderr, flush=True)
        print(f"{word} {behind}: {', '.join(filter(None, places))}", file=sys.stderr, flush=True)
        assert door.ended is not None
        waited: set[asyncio.Future[Any]] = {stopped, door.ended}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        return door.ended.result() if door.ended.done() else 0
    finally:
        await context.__aexit__(None, None, None)
