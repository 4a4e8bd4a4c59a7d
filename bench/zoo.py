"""Every large architecture through the exporter: `python bench/zoo.py --output bench/results/zoo` (`make export-zoo`).

Each tower, in a process of its own so that memory is bounded and a failure costs one row, is exported with random
weights, compared with the eager tower, and timed with ONNX Runtime's CPU provider.
Writes OUTPUT.json (with versions, machine and each row's commit) and OUTPUT.md; what OUTPUT.json holds of other CLIPs
stays.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import commit, markdown_table, origin, package_versions, write_results

NAMES = (
    "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP", "EVA02-B-16",
    "convnext_base_w", "MobileCLIP-S1", "coca_ViT-B-32", "ViT-B-16-SigLIP2", "MobileCLIP2-S0", "MobileCLIP2-B",
    "MobileCLIP2-S4", "PE-Core-S-16-384", "PE-Core-B-16",
)  # fmt: skip
FUSED = ("MultiHeadAttention", "LayerNormalization", "Gelu", "QuickGelu")
BATCHES = (1, 16)
COLUMNS = {
    "clip": "CLIP", "tower": "tower", "seconds": "export, s", "peak_gb": "peak memory, GB", "file_mb": "file, MB",
    "attention": "attention", "layernorm": "LayerNorm", "gelu": "GELU", "max_abs_error": "max error",
    "rate_1": "rows/s, batch 1", "rate_16": "rows/s, batch 16",
}  # fmt: skip


@click.command()
@click.option(
    "--clip", "names", multiple=True, default=NAMES, help="open_clip model names; by default the listed ones."
)
@click.option(
    "--images", type=click.IntRange(2), default=8, show_default=True, help="Inputs to compare with the eager tower."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--plain", is_flag=True, help="Export without ONNX Runtime's own operators.")
@click.option("--prefix", default="", help="Words to put before each command, such as 'flock FILE'.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Path of the results without suffix.")
@click.option("--one", nargs=2, hidden=True, help="Measure this CLIP and tower here and print the row.")
def main(
    names: tuple[str, ...],
    images: int,
    threads: int,
    plain: bool,
    prefix: str,
    output: Path,
    one: tuple[str, str] | None,
) -> None:
    """Export, compare and time large CLIPs."""
    if one is not None:
        with tempfile.TemporaryDirectory(prefix="vilu-zoo-") as folder:
            click.echo(json.dumps(measure(*one, Path(folder), images, threads, fused=not plain)))
        return
    file = output.with_name(f"{output.name}.json")
    held = json.loads(file.read_text())["rows"] if file.exists() else []
    rows: list[dict[str, Any]] = [row for row in held if row["clip"] not in names]
    towers = [(name, tower) for name in names for tower in ("image", "text")]
    for k, (name, tower) in enumerate(towers, 1):
        click.echo(f"[{k}/{len(towers)}] {name}, {tower}", err=True)
        command = [*prefix.split(), sys.executable, __file__, "--one", name, tower, "--images", str(images)]
        command += ["--threads", str(threads), "--output", str(output), *(["--plain"] if plain else [])]
        # Random weights need nothing from a hub, and without a network each tokenizer would wait for it a minute.
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
            row: dict[str, Any] = {"clip": name, "tower": tower, "error": reason}
        else:
            row = json.loads(run.stdout.splitlines()[-1])
        row["commit"] = commit(7)
        click.echo(json.dumps(row))
        rows.append(row)
        write(rows, output, threads)
    if any("error" in row for row in rows):
        raise SystemExit(1)


def measure(name: str, tower: str, folder: Path, images: int, threads: int, *, fused: bool) -> dict[str, Any]:
    """One row of the table; rates are of the fastest of five runs."""
    import logging

    logging.disable(logging.WARNING)
    import numpy as np
    import onnx
    import onnxruntime
    import torch

    from vilu import load_clip
    from vilu.export.graphs import ImageGraph, TextGraph, example_tokens, write_graph

    torch.set_num_threads(threads)
    clip = load_clip(name, "random")
    path = folder / f"clip_{tower}" / "1" / "model.onnx"
    side = clip.transform.size
    graph: torch.nn.Module
    encode: Callable[[torch.Tensor], torch.Tensor]
    if tower == "image":
        generator = torch.Generator().manual_seed(1)
        feed = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)
        graph, encode, source, result = ImageGraph(clip), clip.encode_pixels, "PIXELS", "IMAGE_EMBEDDING"
    else:
        feed = example_tokens(clip, images)
        graph, encode, source, result = TextGraph(clip), clip.encode_tokens, "TOKENS", "TEXT_EMBEDDING"
    with torch.no_grad():
        expected = torch.cat([encode(part) for part in feed.split(2)]).numpy()
    start = time.perf_counter()
    write_graph(graph, feed[:2], path, source, {result: [expected.shape[1]]}, fused=fused)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del graph, encode, clip
    operators = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    actual = np.concatenate([session.run(None, {source: part.numpy()})[0] for part in feed.split(3)])
    row = {
        "clip": name,
        "tower": tower,
        "fused": fused,
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 1e9, 2),
        "file_mb": round(sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6),
        "files": sorted(file.name for file in path.parent.iterdir()),
        "nodes": {kind: operators[kind] for kind in FUSED},
        "attention": operators["MultiHeadAttention"],
        "layernorm": operators["LayerNormalization"],
        "gelu": operators["Gelu"] + operators["QuickGelu"],
        "max_abs_error": float(np.abs(actual - expected).max()),
    }
    for batch in BATCHES:
        rows = {source: feed[[i % images for i in range(batch)]].numpy()}
        session.run(None, rows)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            session.run(None, rows)
            times.append(time.perf_counter() - start)
        row[f"rate_{batch}"] = round(batch / min(times), 2)
    return row


def write(rows: list[dict[str, Any]], output: Path, threads: int) -> None:
    """OUTPUT.json and OUTPUT.md, whole or not at all."""
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([row["clip"], row["tower"], row["error"]])
        else:
            cells.append([f"{row[key]:.1e}" if key == "max_abs_error" else row.get(key, "") for key in COLUMNS])
    table = markdown_table(list(COLUMNS.values()), cells)
    about = {**origin(), **package_versions("onnxruntime"), "threads": threads}
    write_results(output, {".json": {**about, "rows": rows}, ".md": "\n".join(table) + "\n"})


if __name__ == "__main__":
    main()
