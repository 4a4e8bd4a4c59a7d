"""Triton Python model: image embeddings, with candidates of the request's own or the class set, to the answer.

Candidates are TEXT_EMBEDDINGS, or LABELS, whose embeddings are kept: a label that was asked before costs no run of the
text tower. Requests with different candidates are answered in one run of the head (ragged.onnx). No torch.
"""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxruntime
import text  # vilu/text.py, copied beside this file by the export
import triton_python_backend_utils as pb_utils

OUTPUTS = ("CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")


class RequestError(ValueError):
    """A request that cannot be answered, with the reason in one line."""


def unit(rows, what):
    """L2-normalised rows (N, D) float32; refuses what has no direction."""
    rows = np.asarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise RequestError(f"{what} holds a value that is not finite")
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    if not (largest > 0).all():
        raise RequestError(f"{what} holds a row of zeros")
    rows = rows / largest  # the squares of very large or small rows would not be finite
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Metrics:
    """Counters in the server's own metrics; nothing where the server keeps none."""

    def __init__(self, labels):
        self.counters = {}
        for name, told in (
            ("vilu_text_cache_hits", "Prompts whose embedding was kept"),
            ("vilu_text_cache_misses", "Prompts that the text tower had to read"),
            ("vilu_open_refused", "Requests with candidates that were refused"),
        ):
            try:
                family = pb_utils.MetricFamily(name=name, description=told, kind=pb_utils.MetricFamily.COUNTER)
                self.counters[name] = family, family.Metric(labels=labels)
            except pb_utils.TritonModelException:
                return

    def count(self, name, by):
        if by and name in self.counters:
            self.counters[name][1].increment(by)


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        here = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
        self.head = onnxruntime.InferenceSession(here / "ragged.onnx", options, providers=["CPUExecutionProvider"])
        self.names = [name.encode() for name in (here / "labels.txt").read_text("utf-8").split("\n")[:-1]]
        self.classes = np.load(here / "text_embeddings.npy", allow_pickle=False)
        self.templates = json.loads(parameters["templates"])
        self.most_labels, self.longest_label = int(parameters["max_labels"]), int(parameters["max_label_bytes"])
        self.text_batch = int(parameters["text_batch_size"])
        transform = text.TextTransform(**json.loads(parameters["text_transform"]))
        self.tokenizer = text.Tokenizer(here / "tokenizer.json", transform)
        self.kept = OrderedDict()  # (CLIP's fingerprint, prompt) -> (D,) float32, the last used at the end
        self.keep = int(parameters["text_cache_prompts"])
        self.fingerprint = parameters["fingerprint"]
        self.metrics = Metrics({"model": args["model_name"], "version": args["model_version"]})

    def _candidates(self, request, images):
        """One (key, names, make) per image: equal keys are the same candidates, make() gives their rows (K, D)."""
        own = pb_utils.get_input_tensor_by_name(request, "TEXT_EMBEDDINGS")
        labels = pb_utils.get_input_tensor_by_name(request, "LABELS")
        if own is not None and labels is not None:
            raise RequestError("give TEXT_EMBEDDINGS or LABELS, not both")
        if own is not None:
            rows = own.as_numpy()
            if not rows.shape[1]:
                raise RequestError("TEXT_EMBEDDINGS holds no candidate")
            if rows.shape[1] > self.most_labels:
                raise RequestError(f"TEXT_EMBEDDINGS holds {rows.shape[1]} candidates, the limit is {self.most_labels}")
            found = []
            for own_rows in rows:
                own_rows = unit(own_rows, "TEXT_EMBEDDINGS")
                found.append((own_rows.tobytes(), [b""] * len(own_rows), lambda r=own_rows: r))
            return found
        if labels is None:
            return [("class set", self.names, lambda: self.classes)] * images
        return [self._named(row) for row in labels.as_numpy().reshape(images, -1)]

    def _named(self, row):
        if not len(row):
            raise RequestError("LABELS is empty")
        if len(row) > self.most_labels:
            raise RequestError(f"LABELS holds {len(row)} labels, the limit is {self.most_labels}")
        names = []
        for label in row:
            label = label if isinstance(label, bytes) else str(label).encode()
            if len(label) > self.longest_label:
                raise RequestError(f"a label has {len(label)} bytes, the limit is {self.longest_label}")
            try:
                names.append(label.decode("utf-8").strip())
            except UnicodeDecodeError:
                raise RequestError("a label is not UTF-8") from None
        if not all(names):
            raise RequestError("a label is empty")
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise RequestError(f"the label {twice!r} is there twice")
        return tuple(names), [name.encode() for name in names], lambda: self._embed(names)

    def _embed(self, names):
        """(K, D) rows: each the mean of a name's normalised prompt embeddings, normalised again."""
        prompts = [template.replace("{}", name) for name in names for template in self.templates]
        keys = [(self.fingerprint, prompt) for prompt in prompts]
        missing = list(dict.fromkeys(key for key in keys if key not in self.kept))
        self.metrics.count("vilu_text_cache_misses", len(missing))
        self.metrics.count("vilu_text_cache_hits", len(keys) - len(missing))
        fresh: dict = {}
        for start in range(0, len(missing), self.text_batch):
            some = missing[start : start + self.text_batch]
            tokens = self.tokenizer.encode([prompt for _, prompt in some])
            request = pb_utils.InferenceRequest(
                model_name="clip_text",
                inputs=[pb_utils.Tensor("TOKENS", tokens)],
                requested_output_names=["TEXT_EMBEDDING"],
            )
            response = request.exec()
            if response.has_error():
                raise RuntimeError(f"clip_text: {response.error().message()}")
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
        while len(self.kept) > self.keep:
            self.kept.popitem(last=False)
        grouped = np.stack(rows).reshape(len(names), len(self.templates), -1)
        return unit(grouped.mean(axis=1), "the text tower's answer")

    def execute(self, requests):
        answers = [None] * len(requests)
        parts, banks = [], {}  # (request, images, keys); key -> (names, first row, rows)
        count = 0
        for place, request in enumerate(requests):
            try:
                images = pb_utils.get_input_tensor_by_name(request, "IMAGE_EMBEDDING").as_numpy()
                images = unit(images, "IMAGE_EMBEDDING")
                found = self._candidates(request, len(images))
                made = {}  # all of a request's candidates or, where one cannot be had, none
                for key, names, make in found:
                    if key not in banks and key not in made:
                        made[key] = names, make()
            except RequestError as error:
                self.metrics.count("vilu_open_refused", 1)
                answers[place] = self._error(str(error), pb_utils.TritonError.INVALID_ARG)
                continue
            except Exception as error:
                answers[place] = self._error(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
                continue
            for key, (names, rows) in made.items():
                banks[key] = names, count, rows
                count += len(rows)
            parts.append((place, images, [key for key, _, _ in found]))
        if parts:
            self._answer(parts, banks, answers)
        return answers

    def _answer(self, parts, banks, answers):
        images = np.concatenate([rows for _, rows, _ in parts])
        keys = [key for _, _, own in parts for key in own]
        bounds = np.array([[banks[key][1], banks[key][1] + len(banks[key][2])] for key in keys], np.int64)
        feed = {
            "IMAGE_EMBEDDING": images,
            "TEXT_EMBEDDINGS": np.concatenate([rows for _, _, rows in banks.values()]),
            "CANDIDATES": bounds,
        }
        index, *columns = self.head.run(OUTPUTS, feed)
        index = index - bounds[:, :1].astype(np.int32)
        label = np.array([[banks[key][0][int(i)]] for key, (i,) in zip(keys, index, strict=True)], dtype=object)
        values = dict(zip(("LABEL", *OUTPUTS), (label, index, *columns), strict=True))
        start = 0
        for place, rows, _ in parts:
            end = start + len(rows)
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(value[start:end])) for name, value in values.items()]
            answers[place] = pb_utils.InferenceResponse(output_tensors=tensors)
            start = end

    def _error(self, told, code):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(told, code))
