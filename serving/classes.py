"""Class sets of a running server: listed, put, replaced and removed while it answers. No torch.

The server's model `class_sets` does it, by Triton's model control: it is loaded with the change in its configuration,
checks it, and makes it whole or fails to load, which leaves all as it was. Names are embedded by the server itself.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from vilu.class_set import check_names, check_templates, prompts, read_names
from vilu.cli.progress import progress_bar
from vilu.errors import UserError
from vilu.serving.access import connection_options, token_from
from vilu.serving.client import AccessDenied, AsyncClient, RequestRefused

MODEL, TEXT = "class_sets", "vilu_text"


@dataclass(frozen=True)
class ServedSet:
    """A class set that a server has; an image is asked about it by class_set=name. names: where they were asked for."""

    name: str
    version: int
    classes: int
    threshold: float
    templates: tuple[str, ...]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SetFile:
    """What `read_set` found: names and, where the file has them, text_embeddings (K, D) and the CLIP's fingerprint."""

    names: tuple[str, ...]
    text_embeddings: np.ndarray | None = None
    fingerprint: str = ""


async def list_sets(client: AsyncClient) -> list[ServedSet]:
    """Every class set of the server, the exported one ("default") first. Raises UserError as `AsyncClient.ask` does."""
    return (await _told(client, ""))[0]


async def get_set(client: AsyncClient, name: str) -> ServedSet:
    """One class set with its class names. Raises RequestRefused where the server has none of that name."""
    return (await _told(client, name))[0][0]


async def put_set(
    client: AsyncClient,
    name: str,
    names: Sequence[str],
    *,
    control_token: str | None = None,
    text_embeddings: np.ndarray | None = None,
    fingerprint: str = "",
    templates: Sequence[str] | None = None,
    threshold: float | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> ServedSet:
    """Put a class set, or another one in its place: later requests are answered from it, those under way from one of
    the two, whole.

    Args:
        name: 1 to 64 of a-z, 0-9, _ and -.
        control_token: what `vilu serve --control-token` asks for.
        text_embeddings: (K, D) of the server's CLIP, one row a name; by default the server embeds the names.
        fingerprint: of the CLIP that made them, where it is known.
        templates: prompts with one {} each; by default the default set's.
        threshold: accept below this failure probability; by default the default set's.

    Raises:
        RequestRefused: a set that the server does not take, with its reason; the one before stays.
        AccessDenied: a control token that is missing or wrong.
        ServerUnavailable: as `AsyncClient.ask` does.
    """
    sets, fingerprint_served = await _told(client, "")
    chosen = tuple(sets[0].templates if templates is None else templates)
    # What would be refused after all the names had been embedded; the server checks it again.
    check_names(tuple(names), f"class set {name}")
    check_templates(chosen, f"class set {name}")
    if text_embeddings is None:
        text_embeddings = await _embed(client, names, chosen, progress)
        fingerprint = fingerprint_served
    rows = np.ascontiguousarray(text_embeddings, "<f4")
    change = {"put": name, "names": list(names), "templates": list(chosen), "threshold": threshold}
    change |= {"fingerprint": fingerprint, "text_embeddings": base64.b64encode(rows.tobytes()).decode("ascii")}
    await _change(client, change, control_token)
    return await get_set(client, name)


async def remove_set(client: AsyncClient, name: str, *, control_token: str | None = None) -> None:
    """Remove a class set. Raises as `put_set` does."""
    await _change(client, {"remove": name}, control_token)


async def _told(client: AsyncClient, name: str) -> tuple[list[ServedSet], str]:
    """(sets, the CLIP's fingerprint)."""
    asked = np.array([[name.encode("utf-8", "replace")]], dtype=object)
    found = json.loads((await client.infer(MODEL, {"NAME": asked}, "CLASS_SETS"))[0, 0])
    sets = []
    for row in found["sets"]:
        names = None if row["names"] is None else tuple(row["names"])
        sets.append(ServedSet(**row | {"templates": tuple(row["templates"]), "names": names}))
    return sets, found["fingerprint"]


async def _embed(
    client: AsyncClient, names: Sequence[str], templates: Sequence[str], progress: Callable[[str, int, int], None]
) -> np.ndarray:
    """(K, D) rows: each the mean of a name's normalised prompt embeddings; its length does not matter."""
    texts = prompts(names, templates)
    size = max(1, min(client.batch_size, int((await client.config(TEXT)).get("max_batch_size", 1))))
    rows = []
    for start in range(0, len(texts), size):
        some = [[prompt.encode("utf-8", "surrogateescape")] for prompt in texts[start : start + size]]
        rows.append(await client.infer(TEXT, {"TEXT": np.array(some, dtype=object)}, "TEXT_EMBEDDING"))
        progress("embedding", min(start + size, len(texts)), len(texts))
    return np.concatenate(rows).reshape(len(names), len(templates), -1).mean(axis=1)


async def _change(client: AsyncClient, change: dict[str, Any], control_token: str | None) -> None:
    config = await client.config(MODEL)
    # A load with the configuration that is there already does nothing: the number makes each one new.
    change |= {"number": uuid.uuid4().hex}
    config["parameters"]["change"] = {"string_value": json.dumps(change)}
    try:
        await client.load(MODEL, json.dumps(config), control_token)
    except AccessDenied:
        raise
    except RequestRefused as error:
        said = re.search(r"TritonModelException: (.*?) At: ", str(error))
        raise RequestRefused(said[1] if said else str(error)) from None


def read_set(path: Path) -> SetFile:
    """A class set's file: class names, one a line (UTF-8); or .npz or .safetensors with text_embeddings (K, D).

    The names of embeddings are class_names (an array of strings; in safetensors' metadata a JSON list), or the lines of
    a .txt file beside; `fingerprint`, of the CLIP, may stand there likewise. Nothing is unpickled.

    Raises:
        UserError: not such a file.
    """
    if path.suffix not in (".npz", ".safetensors"):
        return SetFile(read_names(path))
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in ("text_embeddings", "class_names", "fingerprint") if name in file}
            rows, names = found.get("text_embeddings"), found.get("class_names")
            fingerprint = str(found.get("fingerprint", ""))
        else:
            from safetensors import safe_open

            with safe_open(path, "numpy") as file:
                rows = file.get_tensor("text_embeddings") if "text_embeddings" in file.keys() else None  # noqa: SIM118
                stored = file.metadata() or {}
            names = json.loads(stored["class_names"]) if "class_names" in stored else None
            fingerprint = stored.get("fingerprint", "")
    except Exception as error:  # NumPy, zip and safetensors raise many types on damaged files
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({told})") from None
    if rows is None or rows.ndim != 2 or rows.dtype.kind != "f":
        raise UserError(f"{path}: holds no text_embeddings (classes, width) of numbers with a point")
    beside = path.with_suffix(".txt")
    if names is None and not beside.is_file():
        raise UserError(f"{path}: holds no class_names, and {beside.name} is not beside it")
    labels = read_names(beside) if names is None else tuple(map(str, names))
    if len(labels) != len(rows):
        raise UserError(f"{path}: {len(labels)} names but text_embeddings of shape {rows.shape}")
    return SetFile(labels, rows.astype(np.float32), fingerprint)


@click.group("classes")
def classes_command() -> None:
    """The class sets of a running server: list them, put one, remove one."""


def server_options(command: Any) -> Any:
    """A command's options to reach a server, and how long to wait for it."""
    command = click.option(
        "--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Seconds."
    )(command)
    return connection_options(command)


control_option = click.option(
    "--control-token", metavar="TOKEN|@FILE", help="As `vilu serve` was given.  [default: $VILU_CONTROL_TOKEN]"
)


def with_client(url: str, token: str | None, options: dict[str, Any], work: Callable[[AsyncClient], Any]) -> Any:
    """What `work` returns, asked of the server that a command's options name."""

    async def run() -> Any:
        async with AsyncClient(url, token=token_from(token, "VILU_TOKEN"), batch_size=64, **options) as client:
            return await work(client)

    return asyncio.run(run())


@classes_command.command("list")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, one object a set.")
def list_command(url: str, token: str | None, as_json: bool, **options: Any) -> None:
    """The class sets that images can be asked about."""
    sets = with_client(url, token, options, list_sets)
    if as_json:
        rows = [{key: value for key, value in asdict(one).items() if key != "names"} for one in sets]
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("class set", "version", "classes", "threshold", "templates")
    for one in sets:
        table.add_row(one.name, str(one.version), str(one.classes), f"{one.threshold:g}", str(len(one.templates)))
    Console().print(table)


@classes_command.command("put")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@server_options
@control_option
@click.option("--template", "templates", multiple=True, help="Prompt with one {}; repeat.  [default: the served ones]")
@click.option("--threshold", type=click.FloatRange(0, 1), help="Accept below it.  [default: the checkpoint's]")
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
    """Put the class set NAME, or replace it, while the server answers.

    FILE holds class names, one a line (UTF-8), or is .npz or .safetensors with their text_embeddings.
    """
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
    click.echo(f"{served.name}@{served.version}: {served.classes} classes, accepted below {served.threshold:g}")


@classes_command.command("remove")
@click.argument("name")
@server_options
@control_option
def remove_command(name: str, url: str, token: str | None, control_token: str | None, **options: Any) -> None:
    """Remove the class set NAME: later requests that name it are refused."""
    control = token_from(control_token, "VILU_CONTROL_TOKEN")
    with_client(url, token, options, lambda client: remove_set(client, name, control_token=control))
    click.echo(f"{name}: removed")
