"""Connections by address for gRPC, which counts none: the surplus of an address is shut down, within a second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter

from vilu.serving.door.limits import Limits
from vilu.serving.door.observe import Metrics

SECONDS = 1.0  # between two looks


async def limit_connections(port: int, limits: Limits, metrics: Metrics) -> None:
    """Look at the process's own sockets, for ever (Linux; elsewhere it does nothing)."""
    while True:
        with contextlib.suppress(OSError):
            metrics.connections.labels("grpc").set(sweep(port, limits, metrics))
        await asyncio.sleep(SECONDS)


def sweep(port: int, limits: Limits, metrics: Metrics) -> int:
    """Shut down the connections to `port` that are too many; returns how many stay."""
    by_address: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile
        with connection, contextlib.suppress(OSError, IndexError, TypeError):
            if connection.getsockname()[1] != port:
                continue
            address = connection.getpeername()[0]
            if by_address[address] >= limits.connections_per_address:
                connection.shutdown(socket.SHUT_RDWR)
                metrics.refusals.labels("connections").inc()
            else:
                by_address[address] += 1
    return sum(by_address.values())
