"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


def default_cache() -> Path:
    """Where embeddings are kept unless told otherwise, as the XDG base directories have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vilu"


def data_options(command: Any) -> Any:
    """--data, --dataset, --root and --cache, as `data`, `dataset`, `root` and `cache`."""
    for option in (
        click.option(
            "--cache",
            type=click.Path(path_type=Path, file_okay=False),
            envvar="VILU_CACHE",
            default=default_cache,
            show_default="VILU_CACHE, or ~/.cache/vilu",
            help="Folder that keeps embeddings: made once, resumed after a kill, made again when anything changed.",
        ),
        click.option(
            "--root", type=click.Path(path_type=Path), help="Where --dataset lies, laid out as CoOp's DATASETS.md says."
        ),
        click.option("--dataset", help="digits, shapes, shapes-captions (embedded), or e.g. flowers102 with --root."),
        click.option(
            "--data",
            help="Image folder (one directory a class), CSV or Parquet of path + caption, "
            "or WebDataset shards (a.tar, 'shards/{000..010}.tar', 'shards/*.tar').",
        ),
    ):
        command = option(command)
    return command


def clip_options(command: Any) -> Any:
    """--clip and --pretrained."""
    command = click.option("--pretrained", help="Weights: an open_clip tag, a local file, or 'random'.")(command)
    return click.option("--clip", "clip_name", help="open_clip model name or local-dir:FOLDER.  [default: vilu-tiny]")(
        command
    )
