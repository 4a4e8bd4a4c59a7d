"""The head on a CPU, for the models vilu_head, vilu_embeddings and vilu_details, each with the graphs it needs.

Requests of one batch are answered together: those over the exported class set by its folded graph where the model has
one, all others, whatever their candidates, in one run of the ragged graph. No torch.
"""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnxruntime
import sets  # copied beside this file by the export
import triton_python_backend_utils as pb_utils

COLUMNS = ["CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY"]
ANSWER = {"LABEL", *COLUMNS, "ACCEPT"}
DETAILS = {"TOP_LABELS", "TOP_PROBABILITIES", "CONCEPTS", "CONCEPT_WEIGHTS", "ENTROPY", "DOCTOR"}
TOP = 5

# What one request asks: its place in the batch, the outputs it wants, rows (B, D), one Candidates an image.
Part = namedtuple("Part", "place wanted embeddings candidates")


class Head:
    def initialize(self, args):
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

    def _open(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(self.parameters["intra_op_thread_count"])
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embeddings(self, request):
        """A request's image embeddings (B, D)."""
        rows = pb_utils.get_input_tensor_by_name(request, "IMAGE_EMBEDDING").as_numpy()
        if not np.isfinite(rows).all():
            raise sets.RequestError("IMAGE_EMBEDDING holds a value that is not finite")
        return rows

    def candidates(self, request, images, known):
        """One Candidates for each image; `known` is for the batch, to make none twice."""
        return [self.class_set(request)] * images

    def class_set(self, request):
        """The set a request names. Details are asked for in a step of their own, which names the version that was
        answered from."""
        version = pb_utils.get_input_tensor_by_name(request, "CLASS_SET_VERSION")
        version = 0 if version is None else int(version.as_numpy()[0, 0])
        return self.store.get(sets.asked(request), version)

    def execute(self, requests):
        responses, parts = [None] * len(requests), []
        known: dict = {}
        for place, request in enumerate(requests):
            try:
                rows = self.embeddings(request)
                candidates = self.candidates(request, len(rows), known)
                parts.append(Part(place, set(request.requested_output_names()), rows, candidates))
            except Exception as error:
                self.refused(error)
                responses[place] = sets.error_response(error)
        values: dict = {part.place: {} for part in parts}
        answered = [part for part in parts if part.wanted & ANSWER]
        if answered:
            self._answer(answered, values)
        for part in parts:
            made = values[part.place]
            if part.wanted & DETAILS:
                made |= self._details(part)
            if "IMAGE_EMBEDDING" in part.wanted:
                made["IMAGE_EMBEDDING"] = part.embeddings
            if "CLASS_SET" in part.wanted:
                made["CLASS_SET"] = np.array([[one.told.encode()] for one in part.candidates], object)
            if "CLASS_SET_VERSION" in part.wanted:
                made["CLASS_SET_VERSION"] = np.array([[one.version] for one in part.candidates], np.int32)
            tensors = [pb_utils.Tensor(name, made[name]) for name in part.wanted]
            responses[part.place] = pb_utils.InferenceResponse(output_tensors=tensors)
        return responses

    def refused(self, error):
        """Called for each request that is not answered."""

    def _answer(self, parts, values):
        rows = np.concatenate([part.embeddings for part in parts])
        candidates = [one for part in parts for one in part.candidates]
        index, confidence, failure = self._run(rows, candidates)
        accept = failure < np.array([[one.threshold] for one in candidates], np.float32)
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

    def _run(self, rows, candidates):
        """CLASS_INDEX, CONFIDENCE and FAILURE_PROBABILITY (N, 1) of rows (N, D) over each one's candidates."""
        folded = np.array(["model" in self.graphs and one is self.default for one in candidates])
        if folded.all():
            return self.graphs["model"].run(COLUMNS, {"IMAGE_EMBEDDING": rows})
        if not folded.any():
            return self._ragged(rows, candidates)
        out = [np.empty((len(rows), 1), kind) for kind in (np.int32, np.float32, np.float32)]
        both = (
            (folded, self.graphs["model"].run(COLUMNS, {"IMAGE_EMBEDDING": rows[folded]})),
            (~folded, self._ragged(rows[~folded], [one for one in candidates if one is not self.default])),
        )
        for mine, columns in both:
            for whole, column in zip(out, columns, strict=True):
                whole[mine] = column
        return out

    def _ragged(self, rows, candidates):
        banks = list({id(one): one for one in candidates}.values())
        ends = np.cumsum([len(bank.rows) for bank in banks])
        at = {id(bank): (end - len(bank.rows), end) for bank, end in zip(banks, ends, strict=True)}
        bounds = np.array([at[id(one)] for one in candidates], np.int64)
        text = banks[0].rows if len(banks) == 1 else np.concatenate([bank.rows for bank in banks])
        feed = {"IMAGE_EMBEDDING": rows, "TEXT_EMBEDDINGS": text, "CANDIDATES": bounds}
        index, *others = self.graphs["ragged"].run(COLUMNS, feed)
        return [index - bounds[:, :1].astype(np.int32), *others]

    def _details(self, part):
        """What lies behind a request's answers, one run for each of its different candidates."""
        graph = self.graphs["details"]
        columns: dict = {}
        names = [output.name for output in graph.get_outputs()]
        for bank in {id(one): one for one in part.candidates}.values():
            mine = [i for i, one in enumerate(part.candidates) if one is bank]
            feed = {"IMAGE_EMBEDDING": part.embeddings[mine], "TEXT_EMBEDDINGS": bank.rows}
            run = dict(zip(names, graph.run(names, feed), strict=True))
            made = {name: run[name] for name in ("ENTROPY", "DOCTOR")}
            made["TOP_LABELS"], made["TOP_PROBABILITIES"] = self._top(run["PROBABILITIES"], bank)
            # A head that looks at the image alone has no attention.
            attention = run.get("ATTENTION", np.empty((len(mine), 0), np.float32))
            made["CONCEPTS"], made["CONCEPT_WEIGHTS"] = self._top(attention, bank)
            for name, rows in made.items():
                whole = columns.setdefault(name, np.empty((len(part.candidates), *rows.shape[1:]), rows.dtype))
                whole[mine] = rows  # a request's images have equally many candidates
        return columns

    def _top(self, weights, bank):
        """The labels of the largest weights (B, K), and these, (B, TOP) or fewer where there are fewer."""
        order = np.argsort(-weights, axis=-1, kind="stable")[:, :TOP]
        labels = [[bank.labels[i] for i in row] for row in order.tolist()]
        return np.array(labels, object).reshape(order.shape), np.take_along_axis(weights, order, axis=-1)
