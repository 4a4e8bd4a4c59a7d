"""`vilu health` checks that a server answers a real question."""

from __future__ import annotations

from typing import Any

import click

from vilu.cli.command import Command
from vilu.cli.options import SECONDS, connection_options


@click.command("health", cls=Command, extra="client")
@connection_options
@click.option("--model", default="vilu", show_default=True, help="Name of the served model.")
@click.option("--timeout", type=SECONDS, default=5.0, show_default=True, help="Seconds to wait for an answer.")
def health_command(url: str, token: str | None, model: str, timeout: float, **tls: Any) -> int:
    """Check that a server answers a real question.

    The question is about an image of one pixel. The exit code is 0, or 1 with the reason. The server's own readiness
    stays true when the process of a model has died; this check does not.
    """
    from vilu.serving import RequestRefused, ServerUnavailable
    from vilu.serving.server import probe
    from vilu.serving.tokens import token_from

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
