"""`vilu web` serves a page that asks a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output
from vilu.cli.command import Command
from vilu.cli.options import PATH, SECONDS, connection_options, host_option
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.serving import AsyncClient


@click.command("web", cls=Command, extra="web")
@connection_options
@host_option
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on. 0 picks a free one.",
)
@click.option("--timeout", type=SECONDS, default=10.0, show_default=True, help="Seconds to wait for an answer.")
@click.option(
    "--allow-host", "names", multiple=True, metavar="NAME", help="Host name of the page. Repeat it for several."
)
@click.option("--max-image-bytes", type=click.IntRange(1), help="Largest image to upload, in bytes.  [default: 20 MiB]")
@click.option(
    "--examples", type=PATH, help="Folder of example images to offer.  [default: embedded images of the served classes]"
)
@click.option("--monitor", metavar="URL", help="Address of a `vilu monitor`; the page /monitor shows its report.")
def web_command(
    url: str,
    token: str | None,
    host: str,
    port: int,
    timeout: float,
    names: tuple[str, ...],
    max_image_bytes: int | None,
    examples: Path | None,
    monitor: str | None,
    **tls: Any,
) -> int:
    """Show a page that asks a running server.

    Drop an image on it and see the answer, and whether to believe it. Everyone who reaches the page asks the server
    with this command's token. The page listens on loopback by default and speaks plain HTTP: elsewhere, put a proxy
    with TLS before it.
    """
    import asyncio

    import uvicorn

    from vilu.preprocess.image import Transform
    from vilu.serving import AsyncClient
    from vilu.serving.address import listen
    from vilu.serving.tokens import token_from
    from vilu.serving.web import AT_ONCE, application, embedded_examples, folder_examples

    token = token_from(token, "VILU_TOKEN")
    if monitor is not None and not monitor.startswith(("http://", "https://")):
        raise UserError(f"--monitor: must be http://HOST:PORT, not {monitor}")

    def connect() -> AsyncClient:
        return AsyncClient(url, token=token, timeout=timeout, in_flight=AT_ONCE, shared_memory=False, **tls)

    async def check() -> None:
        """Make a client once, so that bad options are an error before the page is served."""
        async with connect():
            pass

    asyncio.run(check())
    app = application(
        connect,
        names=(host, *names),
        max_bytes=Transform.max_bytes if max_image_bytes is None else max_image_bytes,
        monitor=monitor,
        examples=embedded_examples() if examples is None else folder_examples(examples),
        served_examples=examples is None,
    )
    with listen(host, port) as listener:
        address = listener.getsockname()
        output.warn(f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}/")
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, proxy_headers=False)
        uvicorn.Server(config).run(sockets=[listener])
    return 0
