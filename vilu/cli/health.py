"""`vilu health` checks that a server answers a real question."""

from __future__ import annotations

import time
from typing import Any

import click

from vilu.cli import output
from vilu.cli.command import Command
from vilu.cli.options import SECONDS, connection_options


@click.command("health", cls=Command, extra="client")
@connection_options
@click.option("--model", default="vilu", show_default=True, help="Name of the served model.")
@click.option("--timeout", type=SECONDS, default=5.0, show_default=True, help="Seconds to wait for an answer.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: url, model, answers, seconds and error.")
def health_command(url: str, token: str | None, model: str, timeout: float, as_json: bool, **tls: Any) -> int:
    """Check that a server answers a real question.

    The question is about an image of one pixel. The exit code is 0, or 1 with the reason. The server's own readiness
    stays true when the process of a model has died; this check does not.
    """
    from vilu.serving import RequestRefused, ServerUnavailable
    from vilu.serving.server import probe
    from vilu.serving.tokens import token_from

    started, error = time.monotonic(), None
    try:
        probe(url, model=model, timeout=timeout, token=token_from(token, "VILU_TOKEN"), **tls)
    except ServerUnavailable as found:
        error = str(found)
    except RequestRefused as found:
        error = f"{url}: {found}"
    if as_json:
        seconds = round(time.monotonic() - started, 3)
        output.document({"url": url, "model": model, "answers": error is None, "seconds": seconds, "error": error})
    elif error is None:
        output.result(f"{url}: {model} answers")
    if error is not None and not as_json:
        output.warn(error)
    return 0 if error is None else 1
