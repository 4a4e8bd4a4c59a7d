"""`vilu guard` puts the front door before a server that runs already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vilu.cli.command import Command
from vilu.cli.door import door_options, limits_of
from vilu.cli.options import DEFAULT_URL, host_option, listening_tls_options


@click.command("guard", cls=Command, extra="door")
@click.option(
    "--url", default=DEFAULT_URL, show_default=True, help="HOST:PORT where the server behind it listens for gRPC."
)
@host_option
@click.option(
    "--port", type=click.IntRange(0, 65535), default=9001, show_default=True, help="Port for gRPC. 0 picks a free one."
)
@click.option("--http-port", type=click.IntRange(0, 65535), help="Port for HTTP.  [default: no HTTP]")
@listening_tls_options
@door_options
def guard_command(
    url: str,
    host: str,
    port: int,
    http_port: int | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    **door: Any,
) -> int:
    """Put the front door before a server that runs already.

    This is `vilu serve --upstream` over gRPC. If the server behind it has a token, clients send it themselves.
    """
    from vilu.serving.access import Access
    from vilu.serving.door import Door, Options, run

    limits = limits_of(door, in_flight=128, sent=128)
    options = Options(
        host=host,
        grpc_port=port,
        http_port=http_port,
        metrics_port=None,
        access=lambda: Access(tls_cert=tls_cert, tls_key=tls_key, tls_ca=tls_ca),
        upstreams=[url],
        limits=limits,
        **door,
    )
    return run(Door(options), word="guarding")
