"""`vilu serve` serves a model repository, with or without the front door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vilu.cli.command import Command
from vilu.cli.config import config_option
from vilu.cli.door import LIMITS, door_options, limits_of, record_of, record_options, watched_files
from vilu.cli.options import PATH, REPOSITORY, SECONDS, all_of, host_option, listening_tls_options
from vilu.errors import UserError

_PORT = click.IntRange(0, 65535)
_PORTS = all_of(
    click.option("--http-port", type=_PORT, default=8000, show_default=True, help="Port for HTTP. 0 picks a free one."),
    click.option("--grpc-port", type=_PORT, default=8001, show_default=True, help="Port for gRPC. 0 picks a free one."),
    click.option(
        "--metrics-port",
        type=_PORT,
        default=8002,
        show_default=True,
        help="Port for Prometheus metrics. 0: a free one.",
    ),
)


@click.command("serve", cls=Command, extra="server", context_settings={"ignore_unknown_options": True})
@config_option
@click.option("--model-repository", type=PATH, default=REPOSITORY, show_default=True, help="Model repository to serve.")
@click.option("--tritonserver", type=PATH, help="The tritonserver binary.  [default: the one that is found]")
@host_option
@_PORTS
@click.option(
    "--startup-seconds",
    type=SECONDS,
    default=60,
    show_default=True,
    help="Seconds to wait for the first answer before giving up.",
)
@click.option("--supervise", is_flag=True, help="Restart the server when it, or the process of a model, dies or hangs.")
@click.option(
    "--direct", is_flag=True, help="No front door: tritonserver itself listens, with its dangers (docs/security.md)."
)
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
@click.option(
    "--upstream",
    "upstreams",
    multiple=True,
    metavar="HOST:PORT",
    help="Address for gRPC of a tritonserver to ask, instead of one started here. Repeat it for several.",
)
@click.option("--upstream-ca", type=PATH, help="PEM file of the authority that signed the servers' certificates.")
@door_options
@record_options
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
    direct: bool,
    token: str | None,
    control_token: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    flags: tuple[str, ...],
    **door: Any,
) -> int:
    """Serve a model repository.

    A front door listens; tritonserver answers behind it, on loopback. Unknown FLAGS are passed to tritonserver. With
    --direct, --tls-cert makes gRPC speak TLS only, and HTTP, for which tritonserver has no TLS, listens on loopback.
    """
    from vilu.serving.access import Access
    from vilu.serving.server import Server
    from vilu.serving.supervise import serve
    from vilu.serving.tokens import token_from
    from vilu.serving.tritonserver import check_flags, find_tritonserver

    def access() -> Access:
        given = token_from(token, "VILU_TOKEN"), token_from(control_token, "VILU_CONTROL_TOKEN")
        return Access(*given, tls_cert, tls_key, tls_ca)

    ports: dict[str, Any] = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    common: dict[str, Any] = {"tritonserver": tritonserver, "startup_seconds": startup_seconds, "flags": flags}
    if flags and not door["upstreams"]:
        own = [name for one in click.get_current_context().command.params for name in one.opts if name[:2] == "--"]
        check_flags(find_tritonserver(tritonserver), flags, own)
    if direct:
        for name, value in door.items():
            if value:
                raise UserError(
                    f"{LIMITS.get(name, '--' + name.replace('_', '-'))}: --direct leaves out the front door"
                )
        server = Server(model_repository, host=host, access=access(), **ports, **common)
        return serve(server, supervise=supervise)

    from vilu.serving.door import Door, Options, own_server, run

    limits, record, upstreams = limits_of(door), record_of(door), door.pop("upstreams")
    options = Options(
        host=host,
        access=access,
        watched=watched_files((token, "VILU_TOKEN"), (control_token, "VILU_CONTROL_TOKEN")),
        upstreams=upstreams,
        limits=limits,
        record=record,
        **ports,
        **door,
    )
    if upstreams and (flags or supervise):
        raise UserError("--upstream: these servers run already, so give neither --supervise nor tritonserver flags")
    return run(Door(options, None if upstreams else own_server(model_repository, **common), supervise=supervise))
