"""`vilu guard`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from vilu.cli.command import Command
from vilu.cli.options import DEFAULT_URL, SECONDS, host_option, listening_tls_options
from vilu.errors import UserError


@click.command("guard", cls=Command, extra="client")
@click.option(
    "--url", default=DEFAULT_URL, show_default=True, help="HOST:PORT where the server behind it listens for gRPC."
)
@host_option
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=9001,
    show_default=True,
    help="Port to listen on. 0 picks a free one.",
)
@listening_tls_options
@click.option(
    "--in-flight",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Number of requests at a time. More are refused at once.",
)
@click.option(
    "--max-request-bytes",
    type=click.IntRange(1),
    default=64 << 20,
    show_default=True,
    help="Largest request in bytes. At most twice --in-flight of them are in memory.",
)
@click.option("--timeout", type=SECONDS, default=60.0, show_default=True, help="Seconds that a request may take.")
def guard_command(
    url: str,
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    in_flight: int,
    max_request_bytes: int,
    timeout: float,
) -> int:
    """Let only well-formed gRPC requests reach a server.

    This is a front for clients who are not trusted. The server behind it listens on loopback, as
    `vilu serve` does. If that server has a token, clients send it themselves.
    """
    import asyncio

    from vilu.serving.access import Access
    from vilu.serving.guard import Guard

    if "://" in url:
        raise UserError(f"{url}: expected HOST:PORT of the server's gRPC")
    access = Access(tls_cert=tls_cert, tls_key=tls_key, tls_ca=tls_ca)

    async def run() -> None:
        guard = Guard(url, access=access, in_flight=in_flight, max_request_bytes=max_request_bytes, timeout=timeout)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with guard.serving(host, port) as bound:
            scheme = "grpcs://" if tls_cert else ""
            print(f"guarding {url}: gRPC {scheme}{host}:{bound}", file=sys.stderr, flush=True)
            await stop.wait()

    asyncio.run(run())
    return 0
