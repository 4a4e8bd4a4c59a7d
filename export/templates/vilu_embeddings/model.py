"""This Triton Python model answers for image embeddings, over a class set or over a request's own candidates.

A request's own candidates are TEXT_EMBEDDINGS or LABELS. The model keeps the embeddings of labels, so only new labels
need a run of the text tower. It needs no torch.
"""

import json
from collections import OrderedDict
from typing import Any

import class_names  # the export copies vilu/preprocess/class_names.py, head.py and sets.py beside this file
import head
import numpy as np
import sets
import triton_python_backend_utils as pb_utils
from sets import Candidates, RequestError, normalise


class Metrics:
    """Counters in the server's metrics. They do nothing if the server keeps no metrics."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.counters: dict[str, tuple[Any, Any]] = {}
        for name, description in (
            ("vilu_text_cache_hits_total", "Prompts whose embedding was kept"),
            ("vilu_text_cache_misses_total", "Prompts that the text tower had to read"),
            ("vilu_open_refused_total", "Requests with candidates that were refused"),
        ):
            try:
                family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
                self.counters[name] = family, family.Metric(labels=labels)
            except pb_utils.TritonModelException:
                return

    def count(self, name: str, by: int) -> None:
        if by and name in self.counters:
            self.counters[name][1].increment(by)


class TritonPythonModel(head.Head):
    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self.templates = json.loads(self.parameters["templates"])
        self.max_labels = int(self.parameters["max_labels"])
        self.max_label_bytes = int(self.parameters["max_label_bytes"])
        self.text_batch = int(self.parameters["text_batch_size"])
        # (CLIP's fingerprint, prompt) -> embedding (D,) float32; the one used last is at the end
        self.kept: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self.max_kept = int(self.parameters["text_cache_prompts"])
        self.fingerprint = self.parameters["fingerprint"]
        self.metrics = Metrics({"model": args["model_name"], "version": args["model_version"]})
        # A later stage of a cascade has a prefix.
        self.text_model = args["model_name"].removesuffix("vilu_embeddings") + "vilu_text"

    def embeddings(self, request: Any) -> np.ndarray:
        given = pb_utils.get_input_tensor_by_name(request, "IMAGE_EMBEDDING").as_numpy()
        rows: np.ndarray = normalise(given, "IMAGE_EMBEDDING")
        return rows

    def refused(self, error: Exception) -> None:
        if isinstance(error, RequestError):
            self.metrics.count("vilu_open_refused_total", 1)

    def candidates(self, request: Any, images: int, made: dict[Any, Any]) -> list[Any]:
        own = pb_utils.get_input_tensor_by_name(request, "TEXT_EMBEDDINGS")
        labels = pb_utils.get_input_tensor_by_name(request, "LABELS")
        if own is not None and labels is not None:
            raise RequestError("give TEXT_EMBEDDINGS or LABELS, not both")
        if own is None and labels is None:
            return [self.class_set(request)] * images
        if sets.requested_set(request):
            given = "LABELS" if own is None else "TEXT_EMBEDDINGS"
            raise RequestError(f"give {given} or class_set, not both")
        if labels is not None:
            return [self._from_labels(row, made) for row in labels.as_numpy().reshape(images, -1)]
        rows = own.as_numpy()
        if rows.shape[1] < 2:
            raise RequestError(f"TEXT_EMBEDDINGS: needs at least two candidates, found {rows.shape[1]}")
        if rows.shape[1] > self.max_labels:
            raise RequestError(f"TEXT_EMBEDDINGS holds {rows.shape[1]} candidates, the limit is {self.max_labels}")
        return [self._from_rows(normalise(each, "TEXT_EMBEDDINGS"), made) for each in rows]

    def _from_rows(self, rows: np.ndarray, made: dict[Any, Any]) -> Any:
        key = rows.tobytes()
        if key not in made:
            made[key] = Candidates([b""] * len(rows), rows, self.default.threshold)
        return made[key]

    def _from_labels(self, row: np.ndarray, made: dict[Any, Any]) -> Any:
        if len(row) > self.max_labels:
            raise RequestError(f"LABELS holds {len(row)} labels, the limit is {self.max_labels}")
        names = []
        for label in row:
            label = label if isinstance(label, bytes) else str(label).encode()
            if len(label) > self.max_label_bytes:
                raise RequestError(f"a label has {len(label)} bytes, the limit is {self.max_label_bytes}")
            try:
                names.append(label.decode("utf-8").strip())
            except UnicodeDecodeError:
                raise RequestError("a label is not UTF-8") from None
        if problem := class_names.names_problem(names, "label"):
            raise RequestError(f"LABELS: {problem}")
        key = tuple(names)
        if key not in made:
            made[key] = Candidates([name.encode() for name in names], self._embed(names), self.default.threshold)
        return made[key]

    def _embed(self, names: list[str]) -> np.ndarray:
        """Return rows (K, D) float32. Each is the normalised mean of a name's normalised prompt embeddings."""
        prompts = [template.replace("{}", name) for name in names for template in self.templates]
        keys = [(self.fingerprint, prompt) for prompt in prompts]
        missing = list(dict.fromkeys(key for key in keys if key not in self.kept))
        self.metrics.count("vilu_text_cache_misses_total", len(missing))
        self.metrics.count("vilu_text_cache_hits_total", len(keys) - len(missing))
        fresh: dict[tuple[str, str], np.ndarray] = {}
        for start in range(0, len(missing), self.text_batch):
            some = missing[start : start + self.text_batch]
            texts = np.array([[prompt.encode()] for _, prompt in some], object)
            request = pb_utils.InferenceRequest(
                model_name=self.text_model,
                inputs=[pb_utils.Tensor("TEXT", texts)],
                requested_output_names=["TEXT_EMBEDDING"],
            )
            response = request.exec()
            if response.has_error():
                # BLS does not pass on the error's code. The labels were checked, so the server is at fault or busy.
                raise RequestError(f"{self.text_model}: {response.error().message()}", pb_utils.TritonError.UNAVAILABLE)
            rows = pb_utils.get_output_tensor_by_name(response, "TEXT_EMBEDDING").as_numpy()
            fresh.update(zip(some, rows.copy(), strict=True))
        rows = []
        for key in keys:
            if key in self.kept:
                self.kept.move_to_end(key)
                rows.append(self.kept[key])
            else:
                rows.append(fresh[key])
        self.kept.update(fresh)
        while len(self.kept) > self.max_kept:
            self.kept.popitem(last=False)
        grouped = np.stack(rows).reshape(len(names), len(self.templates), -1)
        embeddings: np.ndarray = normalise(grouped.mean(axis=1), "the text tower's answer")
        if problem := class_names.rows_problem(names, embeddings, "label"):
            raise RequestError(f"LABELS: {problem}")
        return embeddings
