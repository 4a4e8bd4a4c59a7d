"""Class sets of a running server: listed, put, replaced and removed while it answers. No torch.

The server's model `class_sets` does it, by Triton's model control: it is loaded with the change in its configuration,
checks it, and makes it whole or fails to load, which leaves all as it was. Names are embedded by the server itself.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilu.answers import RequestRefused
from vilu.class_set import check_names, check_templates, prompts, read_names
from vilu.errors import UserError
from vilu.serving.answers import AccessDenied
from vilu.serving.async_client import AsyncClient

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
    return (await _fetch(client, ""))[0]


async def get_set(client: AsyncClient, name: str) -> ServedSet:
    """One class set with its class names. Raises RequestRefused where the server has none of that name."""
    return (await _fetch(client, name))[0][0]


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
    sets, fingerprint_served, stages = await _fetch(client, "")
    chosen = tuple(sets[0].templates if templates is None else templates)
    # What would be refused after all the names had been embedded; the server checks it again.
    check_names(tuple(names), f"class set {name}")
    check_templates(chosen, f"class set {name}")
    if text_embeddings is None:
        text_embeddings = await _embed(client, TEXT, names, chosen, progress)
        fingerprint = fingerprint_served
    elif stages:
        raise UserError(
            f"class set {name}: this server's cascade has {len(stages) + 1} CLIPs, and text_embeddings are one's; "
            "give the names alone"
        )
    change = {"put": name, "names": list(names), "templates": list(chosen), "threshold": threshold}
    change |= {"fingerprint": fingerprint, "text_embeddings": _encoded(text_embeddings)}
    if stages:
        change["more"] = [
            _encoded(await _embed(client, stage["text_model"], names, templates or stage["templates"], progress))
            for stage in stages
        ]
    await _change(client, change, control_token)
    return await get_set(client, name)


async def remove_set(client: AsyncClient, name: str, *, control_token: str | None = None) -> None:
    """Remove a class set. Raises as `put_set` does."""
    await _change(client, {"remove": name}, control_token)


async def _fetch(client: AsyncClient, name: str) -> tuple[list[ServedSet], str, list[dict[str, Any]]]:
    """(sets, the CLIP's fingerprint, what a cascade says of its later stages)."""
    asked = np.array([[name.encode("utf-8", "replace")]], dtype=object)
    found = json.loads((await client.infer(MODEL, {"NAME": asked}, "CLASS_SETS"))[0, 0])
    sets = []
    for row in found["sets"]:
        names = None if row["names"] is None else tuple(row["names"])
        sets.append(ServedSet(**row | {"templates": tuple(row["templates"]), "names": names}))
    return sets, found["fingerprint"], found.get("stages", [])


def _encoded(rows: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(rows, "<f4").tobytes()).decode("ascii")


async def _embed(
    client: AsyncClient,
    model: str,
    names: Sequence[str],
    templates: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> np.ndarray:
    """(K, D) rows by this model: each the mean of a name's normalised prompt embeddings; its length does not matter."""
    texts = prompts(names, templates)
    try:
        config = await client.config(model)
    except AccessDenied:
        raise
    except RequestRefused:
        raise RequestRefused("this server has no text tower: give the class set's text_embeddings") from None
    size = max(1, min(client.batch_size, int(config.get("max_batch_size", 1))))
    rows = []
    for start in range(0, len(texts), size):
        some = [[prompt.encode("utf-8", "surrogateescape")] for prompt in texts[start : start + size]]
        rows.append(await client.infer(model, {"TEXT": np.array(some, dtype=object)}, "TEXT_EMBEDDING"))
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
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        return SetFile(read_names(path))
    try:
        if suffix == ".npz":
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if rows is None or rows.ndim != 2 or rows.dtype.kind != "f":
        raise UserError(f"{path}: holds no text_embeddings (classes, width) of numbers with a point")
    beside = path.with_suffix(".txt")
    if names is None and not beside.is_file():
        raise UserError(f"{path}: holds no class_names, and {beside.name} is not beside it")
    labels = read_names(beside) if names is None else tuple(map(str, names))
    if len(labels) != len(rows):
        raise UserError(f"{path}: {len(labels)} names but text_embeddings of shape {rows.shape}")
    return SetFile(labels, rows.astype(np.float32), fingerprint)
