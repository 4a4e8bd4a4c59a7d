"""`vilu serve` and `vilu health`."""

from __future__ import annotations

from pathlib import Path

import click

from vilu.serving.access import Access, connection_options, token_from
from vilu.serving.client import RequestRefused, ServerUnavailable
from vilu.serving.server import Server, probe, serve


@click.command("serve", context_settings={"ignore_unknown_options": True})
@click.option(
    "--model-repository", type=click.Path(path_type=Path), default=Path("serving/model_repository"), show_default=True
)
@click.option("--tritonserver", type=click.Path(path_type=Path), help="The binary; by default it is searched for.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", type=int, default=8000, show_default=True)
@click.option("--grpc-port", type=int, default=8001, show_default=True)
@click.option("--metrics-port", type=int, default=8002, show_default=True)
@click.option(
    "--startup-seconds", type=float, default=60, show_default=True, help="Give up when nothing answers by then."
)
@click.option("--supervise", is_flag=True, help="Restart the server when it, or a model's process, dies or hangs.")
@click.option("--token", metavar="TOKEN|@FILE", help="Asked of every inference.  [default: $VILU_TOKEN, or none]")
@click.option(
    "--control-token",
    metavar="TOKEN|@FILE",
    help="Opens loading and unloading of models to who has it.  [default: $VILU_CONTROL_TOKEN, or closed]",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM; gRPC speaks TLS only, HTTP stays on loopback.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM; the certificate's key.")
@click.option("--tls-ca", type=click.Path(path_type=Path), help="PEM; clients must show a certificate it signed.")
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
    """Start tritonserver on a model repository. Unknown FLAGS go to tritonserver."""
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


@click.command("health")
@connection_options
@click.option("--model", default="vilu", show_default=True)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True)
def health_command(url: str, token: str | None, model: str, timeout: float, **tls: str | None) -> int:
    """Whether a server really answers: it is asked about an image of one pixel. Exit code 0, or 1 with the reason.

    The server's own readiness stays true when a model's process has died; this does not.
    """
    try:
        probe(url, model=model, timeout=timeout, token=token_from(token, "VILU_TOKEN"), **tls)
    except ServerUnavailable as error:
        click.echo(str(error), err=True)
        return 1
    except RequestRefused as error:
        click.echo(f"{url}: {error}", err=True)
        return 1
    click.echo(f"{url}: {model} answers")
    return 0
