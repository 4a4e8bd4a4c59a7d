"""`vilu serve`."""

from __future__ import annotations

from pathlib import Path

import click

from vilu.cli.command import Command
from vilu.cli.options import PATH, REPOSITORY, all_of, host_option, listening_tls_options

_PORTS = all_of(
    click.option("--http-port", type=int, default=8000, show_default=True, help="Port for HTTP."),
    click.option("--grpc-port", type=int, default=8001, show_default=True, help="Port for gRPC."),
    click.option("--metrics-port", type=int, default=8002, show_default=True, help="Port for Prometheus metrics."),
)


@click.command("serve", cls=Command, extra="server", context_settings={"ignore_unknown_options": True})
@click.option("--model-repository", type=PATH, default=REPOSITORY, show_default=True, help="Model repository to serve.")
@click.option("--tritonserver", type=PATH, help="The tritonserver binary.  [default: the one that is found]")
@host_option
@_PORTS
@click.option(
    "--startup-seconds",
    type=float,
    default=60,
    show_default=True,
    help="Seconds to wait for the first answer before giving up.",
)
@click.option("--supervise", is_flag=True, help="Restart the server when it, or the process of a model, dies or hangs.")
@click.option(
    "--token",
    metavar="TOKEN|@FILE",
    help="Token that every inference request must carry.  [default: $VILU_TOKEN, or none]",
)
@click.option(
    "--control-token",
    metavar="TOKEN|@FILE",
    help="Token that allows loading and unloading models.  [default: $VILU_CONTROL_TOKEN, or nobody may]",
)
@listening_tls_options
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def serve_command(
    model_repository: Path,
    tritonserver: Path | None,
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    startup_seconds: float,
    supervise: bool,
    token: str | None,
    control_token: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    flags: tuple[str, ...],
) -> int:
    """Start tritonserver on a model repository.

    Unknown FLAGS are passed to tritonserver. With --tls-cert gRPC speaks TLS only, and HTTP, for which tritonserver has
    no TLS, listens on loopback.
    """
    from vilu.serving.access import Access, token_from
    from vilu.serving.server import Server, serve

    return serve(
        Server(
            model_repository,
            tritonserver=tritonserver,
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            startup_seconds=startup_seconds,
            flags=flags,
            access=Access(
                token_from(token, "VILU_TOKEN"),
                token_from(control_token, "VILU_CONTROL_TOKEN"),
                tls_cert,
                tls_key,
                tls_ca,
            ),
        ),
        supervise=supervise,
    )
