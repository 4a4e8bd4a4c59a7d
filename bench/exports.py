"""Model repositories to measure: those given, or exported here by `vilu export` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vilu import Checkpoint
from vilu.checkpoint import save_checkpoint
from vilu.errors import UserError


def export_all(
    checkpoint: Checkpoint,
    jpegs: Sequence[bytes],
    repositories: Sequence[Path],
    precisions: str | None,
    quick: bool,
    device: str,
    work: Path,
    exports: list[dict[str, Any]],
    tick: Callable[[str], None],
) -> list[tuple[str, Path]]:
    """(precision, model repository): those given, else one exported here for every precision that can be."""
    if repositories:
        return [(precision_of(repository), repository) for repository in repositories]
    file, folder = work / "checkpoint.safetensors", work / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, file)
    for i, jpeg in enumerate(jpegs):
        (folder / f"{i:04}.jpg").write_bytes(jpeg)
    ready = []
    for precision in precisions.split(",") if precisions else export_precisions(quick, device):
        tick(f"exporting, {precision}")
        try:
            exports.append(export_measured(file, work / precision, folder, precision, device))
            ready.append((precision, work / precision))
        except UserError as error:
            exports.append({"precision": precision, "note": str(error)})
    return ready


def export_measured(checkpoint: Path, output: Path, images: Path, precision: str, device: str) -> dict[str, Any]:
    """`vilu export` in a process of its own: seconds, and the most memory it held.

    Raises:
        UserError: with the last line it printed.
    """
    command = [sys.executable, "-m", "vilu", "export", "--ckpt", str(checkpoint), "--output", str(output)]
    command += ["--images", str(images), "--device", "gpu" if device == "cuda" else "cpu"]
    command += ["--allow-loss"]  # this run judges every row itself, and marks it
    if precision != "float32":
        command += ["--precision", precision]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        printed.seek(0)
        lines = printed.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise UserError(lines[-1] if lines else f"vilu export ended with code {process.returncode}")
    return {"precision": precision, "seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20}


def export_precisions(quick: bool, device: str) -> list[str]:
    """What `vilu export --precision` offers for this device, float32 first."""
    from vilu.cli.export import export_command

    offered = [o for o in export_command.params if o.name == "precision" and isinstance(o.type, click.Choice)]
    known = [str(choice) for o in offered for choice in o.type.choices]  # type: ignore[attr-defined]
    useful = ("bfloat16", "int8") if device == "cpu" else ("float16", "bfloat16")
    return ["float32"] if quick else ["float32", *(p for p in known if p in useful)]


def precision_of(repository: Path) -> str:
    try:
        return str(json.loads((repository / "parity.json").read_text("utf-8"))["precision"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{repository}: no model repository of `vilu export` (parity.json)") from None
