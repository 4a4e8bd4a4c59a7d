"""`Scorer`: an exported repository's answers for batches of images, in this process, without a server or torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vilu.errors import UserError
from vilu.serving.offline.files import read_image
from vilu.serving.offline.stage import DETAILS, EMBEDDING, OUTLIER, Stage, question
from vilu.serving.offline.triton import load_model, read_config, version_folder
from vilu.serving.repository import check_repository

if TYPE_CHECKING:
    import pyarrow as pa

READERS = 16  # files read at a time, as each may be far away
INPUTS = ("image", "path")  # columns of a batch: the encoded image, else the file that holds it
ROUTER = "vilu_router"  # the model that a repository of a cascade has
GROUP = 128  # images whose doubtful ones go on to a later stage of a cascade together
# Images in one run of a later stage, on CPUs and on GPUs. Each image has a place of its own in its run, and few of a
# group go on, so a run of many would mostly be empty.
LATER, LATER_GPU = 2, 8


class Scorer:
    """Answers for images with the files that a server of this repository runs.

    The preprocessing, the towers' graphs and the head are the repository's own, so an answer equals the server's bit
    for bit on the same machine, provider and batch size. A repository for GPU servers is an exception: its head is a
    kernel for the server's GPU memory, so the head's ONNX graph answers instead.

    A repository of a cascade answers as the cascade does: the first stage answers every image, and those whose failure
    probability is above the cascade's threshold go on to the next stage.

    Use it on its own, or with a Ray Dataset of your own that has a column `image` (encoded bytes) or `path`:

        dataset.map_batches(Scorer, fn_constructor_args=["model_repository"], batch_format="pyarrow", batch_size=16)

    Args:
        repository: folder that `vilu export` wrote.
        class_set: name of a class set that was put while a server ran; None is the exported one. Its newest version
            now is used for all batches.
        labels: class names of your own in place of a class set. They are put into the exported prompts.
        details: whether to give the likeliest labels, the labels the head looks at, and other confidences.
        embeddings: whether to give the image embedding, in float16; of a cascade the first stage's, for every image.
        outlier_score: whether to give the outlier score; of a cascade the first stage's, for every image.
        cascade: whether a repository of a cascade answers as the cascade; else its first stage answers alone.
        threads: threads of each image tower; None is what the repository says.
        expected: the `identity` that the repository must have here; None accepts any.

    Attributes:
        batch_size: the largest batch that the server forms. Larger ones are split.
        group_size: how many images are best given at once: a batch, or with a cascade several.
        identity: SHA-256, in hexadecimal, of the files, the class set and the threshold that decide the answers.
        schema: Arrow schema of the answers.

    Raises:
        UserError: the repository does not load, has another identity or has no outlier score, there is no such class
            set, or the labels are refused.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        class_set: str | None = None,
        labels: Sequence[str] | None = None,
        details: bool = False,
        embeddings: bool = False,
        outlier_score: bool = False,
        cascade: bool = True,
        threads: int | None = None,
        expected: str | None = None,
    ) -> None:
        if labels is not None and class_set is not None:
            raise UserError("give labels or a class set, not both")
        self.root = Path(repository).absolute()
        check_repository(self.root)
        self.report = _report(self.root)
        self.models: dict[str, Any] = {}
        self.cascade = _cascade(self.root) if cascade else None
        about = [("", "PIXELS")] if self.cascade is None else self.cascade[1]
        self.pixels = [name for _, name in about]
        self.preprocess = load_model(self.root / "preprocess", self.models)
        self.stages: list[Stage] = []
        for prefix, _ in about:
            version = self.bank.version if self.stages and class_set else None
            options: dict[str, Any] = {"class_set": class_set, "labels": labels, "details": details}
            self.stages.append(Stage(self.root, prefix, self.models, **options, threads=threads, version=version))
        first = self.stages[0]
        if outlier_score and "outlier" not in first.head.graphs:
            raise UserError(f"{self.root}: has no outlier score; export a checkpoint that was trained with one")
        self.files = _digest(self.root, ["preprocess", *(name for stage in self.stages for name in stage.used)])
        self.batch_size = first.batch_size
        self.group_size = self.batch_size
        if self.cascade is not None:
            self.group_size *= max(GROUP // self.batch_size, 1)
        self.details = DETAILS if details else ()
        self.first_alone = (*((EMBEDDING,) if embeddings else ()), *((OUTLIER,) if outlier_score else ()))
        dim = self.bank.rows.shape[1] if embeddings else 0
        self.schema = schema(details, dim, outlier_score, stage=self.cascade is not None)
        self.identity = self._identity()
        if expected is not None and self.identity != expected:
            raise UserError(f"{self.root}: is another repository here, or has changed since the job began")
        self.readers = ThreadPoolExecutor(READERS)

    @property
    def bank(self) -> Any:
        """The first stage's candidates. Those of later stages have the same labels."""
        return self.stages[0].bank

    def _identity(self) -> str:
        digest = hashlib.sha256()
        for stage in self.stages:
            bank = stage.bank
            decided = (self.files, bank.qualified_name, bank.threshold, len(bank.labels))
            digest.update(repr(decided).encode())
            digest.update(b"\n".join(bank.labels))
            digest.update(bank.rows.tobytes())
        if self.cascade is not None:
            digest.update(repr(self.cascade).encode())
        return digest.hexdigest()

    @property
    def metadata(self) -> dict[str, Any]:
        """What decided the answers, for a file's metadata: repository, checkpoint, class set, threshold, versions."""
        import onnxruntime

        about = {
            "repository": self.identity,
            "checkpoint": self.report.get("head"),
            "clip": self.report.get("clip"),
            "precision": self.report.get("precision"),
            "class_set": self.bank.qualified_name or "labels",
            "classes": len(self.bank.labels),
            "threshold": float(self.bank.threshold),
            "provider": self.stages[0].tower.provider,
            "versions": {**self.report.get("versions", {}), "onnxruntime": onnxruntime.__version__},
        }
        if self.cascade is not None:
            later = (self.report.get("cascade") or {}).get("stages") or []
            said = [self.report, *later, *({} for _ in self.stages)]
            about["cascade"] = {
                "threshold": self.cascade[0],
                "stages": [
                    {
                        "checkpoint": one.get("head"),
                        "clip": one.get("clip"),
                        "precision": one.get("precision"),
                        "threshold": float(stage.bank.threshold),
                        "provider": stage.tower.provider,
                    }
                    for one, stage in zip(said, self.stages, strict=False)
                ],
            }
        return about

    def answers(self, images: Sequence[bytes | str], places: Sequence[int] | None = None) -> pa.Table:
        """Return one row an image, in order, with the columns of `schema`.

        The last bits of an answer depend on the size of the batch and on the image's place in it. With `places` they
        depend on the image alone: every batch is filled up, and image i sits at places[i] modulo the batch's size.
        That size is `batch_size`, and smaller in later stages of a cascade. Without `places` the doubtful images of a
        batch are a later stage's batch, as the server has it where the batch was one request.

        Args:
            images: encoded bytes; or a string that says why there are none, which becomes the row's error.
            places: a number for each image that is the same whenever it is answered; None fills no batch up.
        """
        import pyarrow as pa

        tables = []
        size = self.batch_size if places is None else self.group_size
        for start in range(0, len(images), size):
            chosen = slice(start, start + size)
            tables.append(self._group(images[chosen], None if places is None else places[chosen]))
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    def _group(self, images: Sequence[bytes | str], places: Sequence[int] | None) -> pa.Table:
        errors: list[str | None] = [image if isinstance(image, str) else None for image in images]
        columns: dict[str, np.ndarray] = {}
        pixels: dict[str, np.ndarray] = {}  # by their name in the repository
        rows = np.array([row for row, error in enumerate(errors) if error is None], int)
        for number, name in enumerate(self.pixels, 1):
            if name not in pixels:  # else an earlier stage's, which had all of these rows
                rows = self._decode(images, rows, name, pixels, errors)
            if not len(rows):
                break
            rows = self._answer(number, pixels[name], rows, places, columns)
        good = [row for row, error in enumerate(errors) if error is None]
        return self._table(errors, {name: values[good] for name, values in columns.items()} if good else {})

    def _decode(
        self,
        images: Sequence[bytes | str],
        rows: np.ndarray,
        name: str,
        pixels: dict[str, np.ndarray],
        errors: list[str | None],
    ) -> np.ndarray:
        """Put the pixels of these images (n,) into `pixels`, or what is wrong into `errors`; return the good rows."""
        requests = [question({"IMAGE": np.array([[images[row]]], object)}, [name]) for row in rows]
        good = []
        for row, response in zip(rows.tolist(), self.preprocess.execute(requests) if requests else (), strict=True):
            if response.has_error():
                errors[row] = response.error().message()
                continue
            (tensor,) = response.output_tensors()
            _put(pixels, name, tensor.as_numpy(), np.array([row]), len(images))
            good.append(row)
        return np.array(good, int)

    def _answer(
        self,
        number: int,
        pixels: np.ndarray,
        rows: np.ndarray,
        places: Sequence[int] | None,
        columns: dict[str, np.ndarray],
    ) -> np.ndarray:
        """Put a stage's answers for these rows of the pixels (N, S, S, 3) into `columns`; return those that go on."""
        stage, size = self.stages[number - 1], self.batch_size
        if number > 1 and places is not None:
            size = min(size, LATER_GPU if stage.gpu else LATER)
        on = []
        for mine, slots in _batches(rows, places, size):
            batch = pixels[mine]
            if slots is not None:
                whole = np.repeat(batch[:1], size, axis=0)
                whole[slots] = batch
                batch = whole
            found, doubtful = self._answer_batch(number, batch, slots)
            for tensor, values in found.items():
                _put(columns, tensor, values, mine, len(pixels))
            on.append(mine[doubtful])
        return np.sort(np.concatenate(on))

    def _answer_batch(
        self, number: int, pixels: np.ndarray, slots: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return a stage's output tensors for a batch, or its rows `slots`, and which of these rows go on (n,) bool."""
        stage = self.stages[number - 1]
        embedding = stage.embed(pixels)
        found = stage.answer(embedding)
        read = found.pop(EMBEDDING)
        rows = np.arange(len(pixels)) if slots is None else slots
        on = np.zeros(len(pixels), bool)
        if self.cascade is not None:
            found["STAGE"] = np.full((len(pixels), 1), number, np.int32)
            if number < len(self.stages):
                on = found["FAILURE_PROBABILITY"][:, 0].astype(np.float64) > self.cascade[0]
        else:
            embedding = read  # the server's `vilu_open` gives the details of the embedding that its head read
        if number == 1 and self.first_alone:
            found |= stage.more(read, self.first_alone)
        if self.details and not on[rows].all():
            # The server asks for the details of what a stage answers at last. A batch with slots is asked for whole.
            asked = np.flatnonzero(~on) if slots is None else np.arange(len(pixels))
            for name, values in stage.more(embedding[asked], self.details).items():
                _put(found, name, values, asked, len(pixels))
        return {name: values[rows] for name, values in found.items()}, on[rows]

    def _table(self, errors: Sequence[str | None], found: Mapping[str, np.ndarray]) -> pa.Table:
        import pyarrow as pa

        good = np.array([error is None for error in errors], bool)
        place = pa.array(np.cumsum(good) - 1, mask=~good)  # row of `found` for each image; null without an answer
        columns: list[Any] = []
        for field in self.schema:
            if field.name == "error":
                columns.append(pa.array(errors, field.type))
            elif not found:
                columns.append(pa.nulls(len(errors), field.type))
            else:
                columns.append(_arrow(found[field.name.upper()], field.type).take(place))
        return pa.table(columns, schema=self.schema)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer for the column `image` or `path`, and keep the other columns."""
        names = [name for name in INPUTS if name in table.column_names]
        if not names:
            raise UserError(f"a batch needs a column {' or '.join(INPUTS)}, it has {', '.join(table.column_names)}")
        answers = self.answers(self.read(*(table[name] if name in names else None for name in INPUTS)))
        return beside(table.drop_columns([name for name in ("image",) if name in names]), answers)

    def read(self, images: pa.ChunkedArray | None, paths: pa.ChunkedArray | None) -> list[bytes | str]:
        """Return what `answers` takes: each row's bytes, else what its path holds, else why there are none."""
        rows = len(next(column for column in (images, paths) if column is not None))
        blobs = [None] * rows if images is None else images.to_pylist()
        names = [None] * rows if paths is None else paths.to_pylist()
        missing = "no path" if images is None else "no image"
        return list(self.readers.map(_content, blobs, names, [missing] * rows))


def beside(table: pa.Table, answers: pa.Table) -> pa.Table:
    """Return the columns of both. Raises UserError where both have a column of one name."""
    clash = set(table.column_names) & set(answers.column_names)
    if clash:
        raise UserError(f"the input's columns {', '.join(sorted(clash))} have the names of answers")
    for field, column in zip(answers.schema, answers.columns, strict=True):
        table = table.append_column(field, column)
    return table


def schema(details: bool = False, dim: int = 0, outlier_score: bool = False, *, stage: bool = False) -> pa.Schema:
    """Return the Arrow schema of the answers; `dim`: length D of the image embedding, 0 without it; `stage`: whether
    they say which stage of a cascade answered."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "label": pa.string(),
        "class_index": pa.int32(),
        "confidence": pa.float32(),
        "failure_probability": pa.float32(),
        "accept": pa.bool_(),
        "class_set": pa.string(),
        "error": pa.string(),
    }
    if stage:
        columns["stage"] = pa.int32()
    if details:
        columns |= {"top_labels": pa.list_(pa.string()), "top_probabilities": pa.list_(pa.float32())}
        columns |= {"concepts": pa.list_(pa.string()), "concept_weights": pa.list_(pa.float32())}
        columns |= {"entropy": pa.float32(), "doctor": pa.float32()}
    if dim:
        columns["image_embedding"] = pa.list_(pa.float16())
    if outlier_score:
        columns["outlier_score"] = pa.float32()
    return pa.schema(columns)


def _arrow(values: np.ndarray, kind: Any) -> pa.Array:
    import pyarrow as pa

    if not pa.types.is_list(kind):
        flat = values.reshape(-1)
        return pa.array([value.decode() for value in flat] if flat.dtype == object else flat, kind)
    flat = _arrow(values.astype(np.float16) if kind.value_type == pa.float16() else values, kind.value_type)
    return pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], flat)


def _digest(root: Path, models: Sequence[str]) -> str:
    """SHA-256 of the files that these models serve: their configurations and the versions in use."""
    digest = hashlib.sha256()
    for name in sorted(models):
        folder = root / name
        version = version_folder(folder, read_config(folder))
        served = sorted(path for path in version.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        for path in (folder / "config.pbtxt", *served):
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _report(root: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads((root / "parity.json").read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _put(columns: dict[str, np.ndarray], name: str, values: np.ndarray, rows: np.ndarray, count: int) -> None:
    """Put a tensor's values (n, ...) into the rows (n,) of the column (count, ...) that has its name."""
    column = columns.setdefault(name, np.empty((count, *values.shape[1:]), values.dtype))
    column[rows] = values


def _cascade(root: Path) -> tuple[float, list[tuple[str, str]]] | None:
    """The cascade's threshold, and each stage's prefix and the name of its pixels; None where there is no cascade."""
    if not (root / ROUTER).is_dir():
        return None
    parameters = read_config(root / ROUTER)["parameters"]
    try:
        stages = json.loads(parameters["stages"]["string_value"])
        threshold = float(parameters["cascade_threshold"]["string_value"])
        return threshold, [(stage["prefix"], stage["pixels"]) for stage in stages]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{root / ROUTER / 'config.pbtxt'}: does not describe a cascade") from None


def _batches(
    rows: np.ndarray, places: Sequence[int] | None, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the rows (n,) of each batch, and their slots in it; a row's slot is its place modulo `size`."""
    if places is None:
        yield from ((rows[start : start + size], None) for start in range(0, len(rows), size))
        return
    waiting: list[list[int]] = [[] for _ in range(size)]
    for row in rows.tolist():
        waiting[places[row] % size].append(row)
    for taken in itertools.zip_longest(*waiting):
        slots = np.array([slot for slot, row in enumerate(taken) if row is not None])
        yield np.array([taken[slot] for slot in slots]), slots


def _content(image: bytes | None, path: str | bytes | None, missing: str) -> bytes | str:
    if image is not None:
        return image
    return read_image(os.fsdecode(path)) if path and path.strip() else missing
