"""`run_embed`: a data set's image embeddings and labels in the folder that `vilu train --embeddings` maps from disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vilu import atomic
from vilu.errors import UserError
from vilu.serving.offline import files
from vilu.serving.offline.inputs import Input
from vilu.serving.offline.job import DATA, Answers, run_job
from vilu.serving.offline.scorer import Scorer

ROWS = "rows"  # folder of the job's own Parquet files, until the arrays are written


def run_embed(
    names: Sequence[str],
    repository: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    class_set: str | None = None,
    labels: Sequence[str] | None = None,
    label_column: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Embed the images of a labelled data set with a repository's image tower; of a cascade with the first stage's.

    OUTPUT/rows is the job's own data set, which goes on after a kill. OUTPUT/embeddings holds image_embedding.npy
    (N, D) float16, labels.npy (N,), text_embeddings.npy (K, D) and class_names.txt. Only these arrays' row numbers are
    held in memory, 24 bytes a row.

    Args:
        names: see `open_input`.
        repository, class_set, labels: see `Scorer`; they give the K classes and their text embeddings.
        output: a local folder.
        label_column: column of a table with each image's class name, or its index. None: the name of the folder that
            holds the image, with _ read as a space.
        options: as for `run_job`.

    Returns:
        The summary of the job; bad images are left out of the arrays.

    Raises:
        UserError: as `run_job` does, or an image's class is not among the K classes.
    """
    if files.is_uri(os.fspath(output)):
        raise UserError(f"{output}: the arrays are mapped from disk, so the folder must be local")
    root = Path(output)
    asked = Answers(class_set, labels, embeddings=True, cascade=False)
    columns = [label_column] if label_column else []
    scorer = Scorer(repository, class_set=class_set, labels=labels, cascade=False)
    classes = [name.decode() for name in scorer.bank.labels]

    def check(source: Input) -> None:
        if source.kind == "images":
            index = {name: number for number, name in enumerate(classes)}
            for unit in source.units:
                _class(_folder_of(unit.name), index, unit.name)

    summary = run_job(names, repository, root / ROWS, asked=asked, columns=columns, check=check, **options)
    with atomic.folder(root / "embeddings") as folder:
        _write_arrays(root / ROWS / DATA, folder, classes, label_column, scorer.bank.rows.shape[1])
        np.save(folder / "text_embeddings.npy", np.ascontiguousarray(scorer.bank.rows, np.float32))
        (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in classes), "utf-8")
        np.save(folder / "logit_scale.npy", np.float32((scorer.report.get("clip") or {}).get("logit_scale", 100.0)))
    return summary


def _write_arrays(data: Path, folder: Path, classes: Sequence[str], label_column: str | None, dim: int) -> None:
    import pyarrow.dataset as ds

    table = ds.dataset(data, format="parquet")
    answered = ds.field("error").is_null()
    ids = [batch.column(0).to_numpy() for batch in table.to_batches(columns=["row_id"], filter=answered)]
    order = np.sort(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
    if not len(order):
        raise UserError(f"{data}: no image could be embedded")
    embeddings = np.lib.format.open_memmap(folder / "image_embedding.npy", "w+", np.float16, (len(order), dim))
    labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.int64, (len(order),))
    index = {name: number for number, name in enumerate(classes)}
    columns = ["row_id", "source", "image_embedding", *([label_column] if label_column else [])]
    for batch in table.to_batches(columns=columns, filter=answered):
        if not len(batch):
            continue
        place = np.searchsorted(order, batch.column("row_id").to_numpy())
        embeddings[place] = batch.column("image_embedding").flatten().to_numpy().reshape(len(batch), dim)
        sources = batch.column("source").to_pylist()
        values = batch.column(label_column).to_pylist() if label_column else [_folder_of(source) for source in sources]
        labels[place] = [_class(value, index, source) for value, source in zip(values, sources, strict=True)]
    embeddings.flush()
    labels.flush()


def _folder_of(source: str) -> str:
    member = source.rpartition(".tar: ")[2]  # of a shard, the path inside it
    return os.path.basename(os.path.dirname(member)).replace("_", " ")


def _class(value: Any, index: dict[str, int], source: str) -> int:
    if isinstance(value, str) and value in index:
        return index[value]
    if isinstance(value, int | np.integer) and 0 <= value < len(index):
        return int(value)
    if isinstance(value, str) and value.isdecimal() and int(value) < len(index):
        return int(value)
    raise UserError(f"{source}: its class {value!r} is not among the {len(index)} classes")
