"""uvicorn with the limits that it lacks: connections in all and by address, and a deadline for a request's headers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from vilu.serving.door.keys import Keys
from vilu.serving.door.limits import Limits
from vilu.serving.door.observe import Metrics


class HttpServer(uvicorn.Server):
    """An ASGI application on a listening socket; its signals are its caller's.

    Args:
        listener: a listening socket.
    """

    def __init__(
        self, app: ASGIApp, listener: socket.socket, limits: Limits, metrics: Metrics, keys: Keys | None
    ) -> None:
        self.listener = listener
        by_address: Counter[str] = Counter()

        class Protocol(LimitedProtocol):
            door_limits, door_metrics, door_addresses = limits, metrics, by_address

        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(limits.idle_seconds) or 1,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=limits.header_bytes,
        )
        config.load()
        config.ssl = None if keys is None else keys.tls_for_http()
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the caller's."""
        yield

    async def run_on_listener(self) -> None:
        """Serve until `should_exit` is set."""
        await self.serve([self.listener])


class LimitedProtocol(H11Protocol):
    door_limits: Limits
    door_metrics: Metrics
    door_addresses: Counter[str]
    door_counted = False
    door_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        limits = self.door_limits
        if (
            self.door_addresses[self.address] >= limits.connections_per_address
            or self.door_addresses.total() >= limits.connections
        ):
            self.door_metrics.refusals.labels("connections").inc()
            transport.abort()
            return
        self.door_counted = True
        self.door_addresses[self.address] += 1
        self.door_metrics.connections.labels("http").inc()
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._headers_came()
        if self.door_counted:
            self.door_counted = False
            self.door_metrics.connections.labels("http").dec()
            self.door_addresses[self.address] -= 1
            if not self.door_addresses[self.address]:
                del self.door_addresses[self.address]

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self.door_timer is None and (before is None or before.response_complete):
            self._await_headers()
        super().data_received(data)
        if self.cycle is not before:
            self._headers_came()

    def _await_headers(self) -> None:
        self.door_timer = self.loop.call_later(self.door_limits.header_seconds, self._too_slow)

    def _headers_came(self) -> None:
        if self.door_timer is not None:
            self.door_timer.cancel()
            self.door_timer = None

    def _too_slow(self) -> None:
        self.door_timer = None
        self.door_metrics.refusals.labels("too_slow").inc()
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self.door_metrics.refusals.labels("malformed").inc()
        super().send_400_response(msg)
