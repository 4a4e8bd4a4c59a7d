"""`Scorer`: an exported repository's answers for batches of images, in this process, without a server or torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vilu.data.tables import first_line
from vilu.errors import UserError
from vilu.serving.offline.files import read_image
from vilu.serving.offline.triton import InferenceRequest, Tensor, load_model, read_config, version_folder
from vilu.serving.repository import check_repository

if TYPE_CHECKING:
    import pyarrow as pa

ANSWER = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT", "CLASS_SET")
DETAILS = ("TOP_LABELS", "TOP_PROBABILITIES", "CONCEPTS", "CONCEPT_WEIGHTS", "ENTROPY", "DOCTOR")
EMBEDDING, OUTLIER = "IMAGE_EMBEDDING", "OUTLIER_SCORE"
MAX_LABELS = 100_000  # as many as a class set may have
READERS = 16  # files read at a time, as each may be far away
INPUTS = ("image", "path")  # columns of a batch: the encoded image, else the file that holds it


class Scorer:
    """Answers for images with the files that a server of this repository runs.

    The preprocessing, the towers' graphs and the head are the repository's own, so an answer equals the server's bit
    for bit on the same machine, provider and batch size. A repository for GPU servers is an exception: its head is a
    kernel for the server's GPU memory, so the head's ONNX graph answers instead.

    Use it on its own, or with a Ray Dataset of your own that has a column `image` (encoded bytes) or `path`:

        dataset.map_batches(Scorer, fn_constructor_args=["model_repository"], batch_format="pyarrow", batch_size=16)

    Args:
        repository: folder that `vilu export` wrote.
        class_set: name of a class set that was put while a server ran; None is the exported one. Its newest version
            now is used for all batches.
        labels: class names of your own in place of a class set. They are put into the exported prompts.
        details: whether to give the likeliest labels, the labels the head looks at, and other confidences.
        embeddings: whether to give the image embedding, in float16.
        outlier_score: whether to give the outlier score.
        threads: threads of the image tower; None is what the repository says.
        expected: the `identity` that the repository must have here; None accepts any.

    Attributes:
        batch_size: the largest batch that the server forms. Larger ones are split.
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
        threads: int | None = None,
        expected: str | None = None,
    ) -> None:
        if labels is not None and class_set is not None:
            raise UserError("give labels or a class set, not both")
        self.root = Path(repository).absolute()
        check_repository(self.root)
        self.report = _report(self.root)
        config = read_config(self.root / "clip_image")
        gpu = config.get("instance_group", [{}])[0].get("kind") == "KIND_GPU"
        head = "vilu_head" if labels is None and not gpu else "vilu_embeddings"
        python = ["preprocess", head, *(["vilu_details"] if details and head == "vilu_head" else [])]
        graphs = ["clip_image"]
        if labels is not None:
            python.append("tokenize")
            graphs.append("clip_text")
        self.files = _digest(self.root, [*python, *graphs])
        self.models: dict[str, Any] = {}
        for name in python:
            self.models[name] = load_model(self.root / name, self.models)
        self.tower = _graph(self.root / "clip_image", threads)
        self.head = self.models[head]
        if outlier_score and "outlier" not in self.head.graphs:
            raise UserError(f"{self.root}: has no outlier score; export a checkpoint that was trained with one")
        self.details_from = self.models.get("vilu_details", self.head)
        if labels is not None:
            self.models["vilu_text"] = _Text(self.models["tokenize"], _graph(self.root / "clip_text", threads))
        self.batch_size = max(int(config["max_batch_size"]), 1)
        self.bank = self._bank(class_set, labels)
        for model in (self.head, self.details_from):
            # Every batch is answered from this version of the class set, though a newer one may be put meanwhile.
            model.candidates = lambda request, images, made: [self.bank] * images
        self.own = labels is not None
        more = (*((EMBEDDING,) if embeddings else ()), *((OUTLIER,) if outlier_score else ()))
        self.wanted = (*ANSWER, *(DETAILS if details else ()), *more)
        self.schema = schema(details, self.bank.rows.shape[1] if embeddings else 0, outlier_score)
        self.identity = self._identity()
        if expected is not None and self.identity != expected:
            raise UserError(f"{self.root}: is another repository here, or has changed since the job began")
        self.readers = ThreadPoolExecutor(READERS)

    def _bank(self, class_set: str | None, labels: Sequence[str] | None) -> Any:
        try:
            if labels is None:
                return self.head.store.get(class_set or "")
            self.head.max_labels = MAX_LABELS
            return self.head._from_labels(np.array([label.encode() for label in labels], object), {})
        except UnicodeEncodeError:
            raise UserError("a label is not UTF-8") from None
        except ValueError as error:  # the model's own refusal of a request
            raise UserError(f"{self.root}: {first_line(error)}") from None

    def _identity(self) -> str:
        names, bank = b"\n".join(self.bank.labels), self.bank
        digest = hashlib.sha256(repr((self.files, bank.qualified_name, bank.threshold, len(bank.labels))).encode())
        digest.update(names)
        digest.update(bank.rows.tobytes())
        return digest.hexdigest()

    @property
    def metadata(self) -> dict[str, Any]:
        """What decided the answers, for a file's metadata: repository, checkpoint, class set, threshold, versions."""
        import onnxruntime

        return {
            "repository": self.identity,
            "checkpoint": self.report.get("head"),
            "clip": self.report.get("clip"),
            "precision": self.report.get("precision"),
            "class_set": self.bank.qualified_name or "labels",
            "classes": len(self.bank.labels),
            "threshold": float(self.bank.threshold),
            "provider": self.tower.provider,
            "versions": {**self.report.get("versions", {}), "onnxruntime": onnxruntime.__version__},
        }

    def answers(self, images: Sequence[bytes | str], places: Sequence[int] | None = None) -> pa.Table:
        """Return one row an image, in order, with the columns of `schema`.

        The last bits of an answer depend on the size of the batch and on the image's place in it. With `places` they
        depend on the image alone: every batch is filled up to `batch_size`, and image i sits at places[i] modulo it.

        Args:
            images: encoded bytes; or a string that says why there are none, which becomes the row's error.
            places: a number for each image that is the same whenever it is answered; None fills no batch up.
        """
        import pyarrow as pa

        size = self.batch_size
        if places is None:
            tables = [self._batch(images[i : i + size], None) for i in range(0, len(images), size)]
        else:
            parts = _by_slot(images, [place % size for place in places])
            tables = [self._batch(part, slots) for part, slots in parts]
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    def _batch(self, images: Sequence[bytes | str], slots: Sequence[int] | None) -> pa.Table:
        errors: list[str | None] = [image if isinstance(image, str) else None for image in images]
        given = [row for row, error in enumerate(errors) if error is None]
        requests = [_request({"IMAGE": np.array([[images[row]]], object)}, ["PIXELS"]) for row in given]
        pixels = []
        for row, response in zip(given, self.models["preprocess"].execute(requests) if requests else (), strict=True):
            if response.has_error():
                errors[row] = response.error().message()
            else:
                pixels.append(response.output_tensors()[0].as_numpy()[0])
        found: dict[str, np.ndarray] = {}
        if pixels and slots is None:
            found = self._answer(np.stack(pixels))
        elif pixels and slots is not None:
            rows = [slots[row] for row in given if errors[row] is None]
            whole = np.repeat(pixels[0][None], self.batch_size, axis=0)
            whole[rows] = pixels
            found = {name: values[rows] for name, values in self._answer(whole).items()}
        return self._table(errors, found)

    def _answer(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return output tensors by name for pixels (B, S, S, 3) uint8."""
        embedding = np.asarray(self.tower.run([EMBEDDING], {"PIXELS": pixels})[0])
        bad = ~np.isfinite(embedding).all(axis=1)
        if bad.any():
            raise ValueError(f"the image tower gave {int(bad.sum())} embeddings that are not finite")
        found = _run(self.head, {EMBEDDING: embedding}, (*ANSWER, *((EMBEDDING,) if self.own else ())))
        if self.own:  # in the server's ensemble `vilu_open` the details come from the embedding that was answered
            embedding = found.pop(EMBEDDING)
        if len(self.wanted) > len(ANSWER):
            version = np.full((len(pixels), 1), self.bank.version, np.int32)
            more = [name for name in self.wanted if name not in ANSWER]
            found |= _run(self.details_from, {EMBEDDING: embedding, "CLASS_SET_VERSION": version}, more)
        return found

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


class _Text:
    """The ensemble `vilu_text`: prompts to their embeddings."""

    def __init__(self, tokenize: Any, graph: Any) -> None:
        self.tokenize, self.graph = tokenize, graph

    def execute(self, requests: list[Any]) -> list[Any]:
        from vilu.serving.offline.triton import InferenceResponse

        responses = []
        for request, tokens in zip(requests, self.tokenize.execute(requests), strict=True):
            if not tokens.has_error():
                ids = tokens.output_tensors()[0].as_numpy()
                tokens = InferenceResponse(
                    [
                        Tensor(name, self.graph.run([name], {"TOKENS": ids})[0])
                        for name in request.requested_output_names()
                    ]
                )
            responses.append(tokens)
        return responses


def schema(details: bool = False, dim: int = 0, outlier_score: bool = False) -> pa.Schema:
    """Return the Arrow schema of the answers; `dim`: length D of the image embedding, 0 without it."""
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


def _request(inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> InferenceRequest:
    return InferenceRequest("", [Tensor(name, array) for name, array in inputs.items()], wanted)


def _run(model: Any, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    (response,) = model.execute([_request(inputs, wanted)])
    if response.has_error():
        raise ValueError(response.error().message())
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def _graph(folder: Path, threads: int | None) -> Any:
    """Open a tower as the server of its config does: on a CPU with the backend's own code, else on CUDA."""
    import onnxruntime

    from vilu.serving.backends.onnxruntime import session

    config = read_config(folder)
    path = version_folder(folder, config) / (config.get("default_model_filename") or "model.onnx")
    asked = {key: value["string_value"] for key, value in config["parameters"].items()}
    try:
        if "provider" in asked or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            count = int(asked.get("intra_op_thread_count", 0)) if threads is None else threads
            return session.open_session(path, asked.get("provider", "cpu"), asked.get("precision", "float32"), count)
        opened = session.OnnxRuntime(path)
        opened.session.set_providers(["CUDAExecutionProvider", "CPUExecutionProvider"], [{"use_tf32": "0"}, {}])
        opened.provider = "ONNX Runtime, CUDA provider"
        return opened
    except Exception as error:  # the runtimes have no common type
        raise UserError(f"{path}: does not load ({type(error).__name__}: {first_line(error)})") from None


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


def _by_slot(
    images: Sequence[bytes | str], slots: Sequence[int]
) -> Iterator[tuple[Sequence[bytes | str], Sequence[int]]]:
    """Yield runs of images, in order, with their slots; no slot is twice in a run."""
    start, used = 0, set[int]()
    for row, slot in enumerate(slots):
        if slot in used:
            yield images[start:row], slots[start:row]
            start, used = row, set()
        used.add(slot)
    if start < len(images):
        yield images[start:], slots[start:]


def _content(image: bytes | None, path: str | bytes | None, missing: str) -> bytes | str:
    if image is not None:
        return image
    return read_image(os.fsdecode(path)) if path and path.strip() else missing
