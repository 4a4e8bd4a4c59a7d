"""`vilu classes` lists, puts and removes the class sets of a running server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output
from vilu.cli.command import Command, Group
from vilu.cli.options import PATH, FloatRange, control_option, server_options, with_client
from vilu.cli.progress import progress_bar

if TYPE_CHECKING:
    from vilu.serving import AsyncClient
    from vilu.serving.classes import ServedSet


@click.group("classes", cls=Group)
def classes_command() -> None:
    """List, put and remove the class sets of a running server."""


@classes_command.command("list", cls=Command, extra="client")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with one object per class set.")
def list_command(url: str, token: str | None, as_json: bool, **options: Any) -> None:
    """List the class sets that images can be asked about."""
    from vilu.cli.tables import print_rows
    from vilu.serving.classes import list_sets

    sets = with_client(url, token, options, list_sets)
    if as_json:
        output.document([{key: value for key, value in asdict(one).items() if key != "names"} for one in sets])
        return
    rows = [
        (one.name, str(one.version), str(one.classes), f"{one.threshold:g}", str(len(one.templates))) for one in sets
    ]
    print_rows(("class set", "version", "classes", "threshold", "templates"), rows, cut=(0,))


@classes_command.command("put", cls=Command, extra="client")
@click.argument("name")
@click.argument("file", type=PATH)
@server_options
@control_option
@click.option(
    "--template",
    "templates",
    multiple=True,
    help="Prompt with one {} for the class name. Repeat it for several.  [default: the default set's prompts]",
)
@click.option(
    "--threshold",
    type=FloatRange(0, 1),
    help="Failure probability below which an answer is accepted.  [default: the checkpoint's threshold]",
)
def put_command(
    name: str,
    file: Path,
    url: str,
    token: str | None,
    control_token: str | None,
    templates: tuple[str, ...],
    threshold: float | None,
    **options: Any,
) -> None:
    """Put the class set NAME, or replace the one of that name.

    The server goes on answering, and every answer is from one whole set. FILE holds class names, one per line (UTF-8),
    or is a .npz or .safetensors file with their text_embeddings.
    """
    from vilu.serving.classes import put_set, read_set
    from vilu.serving.tokens import token_from

    found = read_set(file)
    control = token_from(control_token, "VILU_CONTROL_TOKEN")
    with progress_bar() as bar:

        async def work(client: AsyncClient) -> ServedSet:
            return await put_set(
                client,
                name,
                found.names,
                control_token=control,
                text_embeddings=found.text_embeddings,
                fingerprint=found.fingerprint,
                templates=templates or None,
                threshold=threshold,
                progress=bar,
            )

        served = with_client(url, token, options, work)
    output.result(f"{served.name}@{served.version}: {served.classes} classes, accepted below {served.threshold:g}")


@classes_command.command("remove", cls=Command, extra="client")
@click.argument("name")
@server_options
@control_option
def remove_command(name: str, url: str, token: str | None, control_token: str | None, **options: Any) -> None:
    """Remove the class set NAME. Later requests that name it are refused."""
    from vilu.serving.classes import remove_set
    from vilu.serving.tokens import token_from

    control = token_from(control_token, "VILU_CONTROL_TOKEN")
    with_client(url, token, options, lambda client: remove_set(client, name, control_token=control))
    output.result(f"{name}: removed")
