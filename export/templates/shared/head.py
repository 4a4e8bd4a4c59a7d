"""The head on a CPU. The models vilu_head, vilu_embeddings and vilu_details use it, each with its own graphs.

The requests of one batch are answered together. Requests over the exported class set run in its folded graph if the
model has one. All others run in ragged.onnx, in one run for all their different candidates. The file needs no torch.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import sets  # the export copies it beside this file
import triton_python_backend_utils as pb_utils

COLUMNS = ["CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY"]
ANSWER = {"LABEL", *COLUMNS, "ACCEPT"}
DETAILS = {"TOP_LABELS", "TOP_PROBABILITIES", "CONCEPTS", "CONCEPT_WEIGHTS", "ENTROPY", "DOCTOR"}
OUTLIER = "OUTLIER_SCORE"
TOP = 5  # number of labels in the details


class Part(NamedTuple):
    """One request of a batch.

    Attributes:
        place: index of the request in the batch.
        wanted: names of the outputs that the request asks for.
        embeddings: image embeddings (B, D) float32.
        candidates: B Candidates, one per image.
    """

    place: int
    wanted: set[str]
    embeddings: np.ndarray
    candidates: list[Any]


class Head:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.here = Path(args["model_repository"]) / args["model_version"]
        self.graphs = {path.stem: self._open(path) for path in self.here.glob("*.onnx")}
        self.default = sets.Candidates(
            [name.encode() for name in (self.here / "labels.txt").read_text("utf-8").split("\n")[:-1]],
            np.load(self.here / "text_embeddings.npy", allow_pickle=False),
            float(self.parameters["threshold"]),
            sets.DEFAULT,
            int(args["model_version"]),
        )
        self.store = sets.Store(sets.folder_of(args), self.default, self.parameters["fingerprint"])
        self.tally = sets.Tally(args)
        given = self.parameters.get("outlier_threshold")
        self.outlier_threshold = None if given is None else np.float32(given)

    def _open(self, path: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(self.parameters["intra_op_thread_count"])
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embeddings(self, request: Any) -> np.ndarray:
        """Return a request's image embeddings (B, D). Raises RequestError if a value is not finite."""
        rows: np.ndarray = pb_utils.get_input_tensor_by_name(request, "IMAGE_EMBEDDING").as_numpy()
        if not np.isfinite(rows).all():
            raise sets.RequestError("IMAGE_EMBEDDING holds a value that is not finite")
        return rows

    def candidates(self, request: Any, images: int, made: dict[Any, Any]) -> list[Any]:
        """Return one Candidates per image. `made` keeps those of this batch, so that none is made twice."""
        return [self.class_set(request)] * images

    def class_set(self, request: Any) -> Any:
        """Return the set and version that a request names. Details name one, because they come after the answer."""
        version = pb_utils.get_input_tensor_by_name(request, "CLASS_SET_VERSION")
        version = 0 if version is None else int(version.as_numpy()[0, 0])
        return self.store.get(sets.requested_set(request), version)

    def execute(self, requests: list[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        parts: list[Part] = []
        made: dict[Any, Any] = {}
        for place, request in enumerate(requests):
            try:
                rows = self.embeddings(request)
                candidates = self.candidates(request, len(rows), made)
                parts.append(Part(place, set(request.requested_output_names()), rows, candidates))
            except Exception as error:
                self.refused(error)
                responses[place] = sets.error_response(error)
        values: dict[int, dict[str, np.ndarray]] = {part.place: {} for part in parts}
        answered = [part for part in parts if part.wanted & ANSWER]
        if answered:
            self._answer(answered, values)
        for part in parts:
            columns = values[part.place]
            if part.wanted & DETAILS:
                columns |= self._details(part)
            if OUTLIER in part.wanted:
                columns[OUTLIER] = self._outlier(part.embeddings)
            if "IMAGE_EMBEDDING" in part.wanted:
                columns["IMAGE_EMBEDDING"] = part.embeddings
            if "CLASS_SET" in part.wanted:
                columns["CLASS_SET"] = np.array([[one.qualified_name.encode()] for one in part.candidates], object)
            if "CLASS_SET_VERSION" in part.wanted:
                columns["CLASS_SET_VERSION"] = np.array([[one.version] for one in part.candidates], np.int32)
            tensors = [pb_utils.Tensor(name, columns[name]) for name in part.wanted]
            responses[part.place] = pb_utils.InferenceResponse(output_tensors=tensors)
        return responses

    def refused(self, error: Exception) -> None:
        """Do nothing. A model can override this to count refused requests."""

    def _answer(self, parts: list[Part], values: dict[int, dict[str, np.ndarray]]) -> None:
        """Put the answers of these requests into `values`, and count them in the metrics."""
        rows = np.concatenate([part.embeddings for part in parts])
        candidates = [one for part in parts for one in part.candidates]
        index, confidence, failure = self._run(rows, candidates)
        accept = failure < np.array([[one.threshold] for one in candidates], np.float32)
        if self.outlier_threshold is not None:
            # The score knows the exported classes alone: it says nothing about other candidates.
            own = np.array([one is self.default for one in candidates])
            if own.any():
                accept[own] &= self._outlier(rows[own]) <= self.outlier_threshold
        label = np.array([[one.labels[i]] for one, i in zip(candidates, index[:, 0].tolist(), strict=True)], object)
        columns = dict(zip([*COLUMNS, "ACCEPT", "LABEL"], (index, confidence, failure, accept, label), strict=True))
        start = 0
        for part in parts:
            end = start + len(part.embeddings)
            values[part.place] |= {name: column[start:end] for name, column in columns.items() if name in part.wanted}
            start = end
        names = [one.name or sets.OPEN for one in candidates]
        for name in set(names):
            mine = [i for i, other in enumerate(names) if other == name]
            self.tally.count(name, failure[mine], accept[mine])

    def _run(self, rows: np.ndarray, candidates: list[Any]) -> list[np.ndarray]:
        """Return CLASS_INDEX, CONFIDENCE and FAILURE_PROBABILITY (N, 1) for rows (N, D) over their own candidates."""
        folded = np.array(["model" in self.graphs and one is self.default for one in candidates])
        if folded.all():
            found: list[np.ndarray] = self.graphs["model"].run(COLUMNS, {"IMAGE_EMBEDDING": rows})
            return found
        if not folded.any():
            return self._run_open(rows, candidates)
        out = [np.empty((len(rows), 1), kind) for kind in (np.int32, np.float32, np.float32)]
        both = (
            (folded, self.graphs["model"].run(COLUMNS, {"IMAGE_EMBEDDING": rows[folded]})),
            (~folded, self._run_open(rows[~folded], [one for one in candidates if one is not self.default])),
        )
        for mine, columns in both:
            for whole, column in zip(out, columns, strict=True):
                whole[mine] = column
        return out

    def _run_open(self, rows: np.ndarray, candidates: list[Any]) -> list[np.ndarray]:
        """Do as `_run` does for any candidates, in one run of the graph that takes candidates as an input."""
        banks = list({id(one): one for one in candidates}.values())
        ends = np.cumsum([len(bank.rows) for bank in banks])
        at = {id(bank): (end - len(bank.rows), end) for bank, end in zip(banks, ends, strict=True)}
        bounds = np.array([at[id(one)] for one in candidates], np.int64)
        text = banks[0].rows if len(banks) == 1 else np.concatenate([bank.rows for bank in banks])
        feed = {"IMAGE_EMBEDDING": rows, "TEXT_EMBEDDINGS": text, "CANDIDATES": bounds}
        index, *others = self.graphs["ragged"].run(COLUMNS, feed)
        return [index - bounds[:, :1].astype(np.int32), *others]

    def _outlier(self, rows: np.ndarray) -> np.ndarray:
        """Return OUTLIER_SCORE (N, 1) for rows (N, D): how unlike the training images of the exported classes."""
        score: np.ndarray = self.graphs["outlier"].run([OUTLIER], {"IMAGE_EMBEDDING": rows})[0]
        return score

    def _details(self, part: Part) -> dict[str, np.ndarray]:
        """Return the details of a request's answers, with one run for each of its different candidates."""
        graph = self.graphs["details"]
        columns: dict[str, np.ndarray] = {}
        names = [output.name for output in graph.get_outputs()]
        for bank in {id(one): one for one in part.candidates}.values():
            mine = [i for i, one in enumerate(part.candidates) if one is bank]
            feed = {"IMAGE_EMBEDDING": part.embeddings[mine], "TEXT_EMBEDDINGS": bank.rows}
            run = dict(zip(names, graph.run(names, feed), strict=True))
            made = {name: run[name] for name in ("ENTROPY", "DOCTOR")}
            made["TOP_LABELS"], made["TOP_PROBABILITIES"] = self._top(run["PROBABILITIES"], bank)
            # A head that reads only the image embedding has no attention.
            attention = run.get("ATTENTION", np.empty((len(mine), 0), np.float32))
            made["CONCEPTS"], made["CONCEPT_WEIGHTS"] = self._top(attention, bank)
            for name, rows in made.items():
                whole = columns.setdefault(name, np.empty((len(part.candidates), *rows.shape[1:]), rows.dtype))
                whole[mine] = rows  # all images of a request have the same number of candidates
        return columns

    def _top(self, weights: np.ndarray, bank: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels with the largest weights (B, K), and their weights, both (B, min(TOP, K))."""
        order = np.argsort(-weights, axis=-1, kind="stable")[:, :TOP]
        labels = [[bank.labels[i] for i in row] for row in order.tolist()]
        return np.array(labels, object).reshape(order.shape), np.take_along_axis(weights, order, axis=-1)
