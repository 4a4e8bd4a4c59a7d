"""`vilu versions` lists the versions of a model repository, or serves another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from vilu.cli import output
from vilu.cli.command import Command
from vilu.cli.options import PATH, control_option, server_options, with_client
from vilu.errors import UserError


@click.command("versions", cls=Command, extra="export")
@click.argument("repository", type=PATH)
@click.option(
    "--use", "chosen", type=click.IntRange(1), help="Number of the version to serve from the server's next start on."
)
@click.option("--live", is_flag=True, help="With --use: make the running server at --url change to it now.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: repository, versions, served and changes.")
@click.option(
    "--threshold",
    metavar="NUMBER|CKPT",
    help="Serve a copy of the served version with this threshold, or with that of this checkpoint of the same head.",
)
@server_options
@control_option
def versions_command(
    repository: Path,
    chosen: int | None,
    live: bool,
    as_json: bool,
    threshold: str | None,
    url: str,
    token: str | None,
    control_token: str | None,
    **options: Any,
) -> None:
    """List the versions of a model repository, or serve another one.

    The list marks the served version. --use goes back, or forward, to another. --threshold makes a new version without
    exporting anything again.
    """
    from vilu.export.versions import served, switch, use, versions
    from vilu.serving.tokens import token_from

    if live and chosen is None and threshold is None:
        raise UserError("--live needs --use VERSION or --threshold")
    if threshold is not None:
        if chosen is not None:
            raise UserError("--use and --threshold: give one or the other")
        before = served(repository)
        chosen = _with_threshold(repository, threshold)
        output.note(f"{repository}: version {chosen} has this threshold; --use {before} goes back")
    changed: list[str] | None = None
    if chosen is not None and live:
        version, control = chosen, token_from(control_token, "VILU_CONTROL_TOKEN")
        with_client(url, token, options, lambda client: switch(client, repository, version, control_token=control))
        output.note(f"{repository}: version {chosen} is served")
    elif chosen is not None:
        changed = list(use(repository, chosen))
        output.note(f"{repository}: version {chosen} is next; what changes: {', '.join(changed) or 'nothing'}")
    present, now = versions(repository), served(repository)
    if as_json:
        output.document({"repository": str(repository), "versions": present, "served": now, "changes": changed})
        return
    for version in present:
        output.result(f"{version}{' served' if version == now else ''}")


def _with_threshold(repository: Path, given: str) -> int:
    """Return the number of the new version. `given` is a number, or the name of a checkpoint that has a threshold."""
    from vilu.export.threshold import add_threshold

    try:
        return add_threshold(repository, float(given))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
    from vilu.checkpoint import digest, load_checkpoint

    checkpoint = load_checkpoint(Path(given))
    reference = (checkpoint.meta.get("calibration") or {}).get("reference")
    text = json.dumps(reference) if reference else ""
    return add_threshold(repository, checkpoint.threshold, text, checkpoint=digest(checkpoint))
