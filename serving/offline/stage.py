"""One stage of a repository, run in this process: a CLIP's image tower, its head and the details of its answers.

A repository without a cascade has one stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vilu.data.tables import first_line
from vilu.errors import UserError
from vilu.serving.offline.triton import (
    InferenceRequest,
    InferenceResponse,
    Tensor,
    load_model,
    read_config,
    version_folder,
)

ANSWER = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT", "CLASS_SET")
DETAILS = ("TOP_LABELS", "TOP_PROBABILITIES", "CONCEPTS", "CONCEPT_WEIGHTS", "ENTROPY", "DOCTOR")
EMBEDDING, OUTLIER = "IMAGE_EMBEDDING", "OUTLIER_SCORE"
MAX_LABELS = 100_000  # as many as a class set may have


class Stage:
    """Answers for the pixels of one image tower.

    Args:
        root: the repository.
        prefix: of the names of the stage's models.
        models: the models that requests inside the repository can reach, by name; the stage adds its own.
        class_set, labels, threads: see `Scorer`.
        details: whether `more` is to give DETAILS.
        version: of the class set; None is the newest.

    Attributes:
        used: names of the models whose files decide the answers.
        bank: the candidates (labels, rows, threshold, name, version) that all answers are chosen from.
        head, tower: the loaded models.
        batch_size: the largest batch of the image tower.
        gpu: whether the repository is for GPU servers.

    Raises:
        UserError: a model does not load, there is no such class set, or the labels are refused.
    """

    def __init__(
        self,
        root: Path,
        prefix: str,
        models: dict[str, Any],
        *,
        class_set: str | None,
        labels: Sequence[str] | None,
        details: bool,
        threads: int | None,
        version: int | None = None,
    ) -> None:
        config = read_config(root / f"{prefix}clip_image")
        self.gpu = config.get("instance_group", [{}])[0].get("kind") == "KIND_GPU"
        self.own = labels is not None
        head = "vilu_head" if not self.own and not self.gpu else "vilu_embeddings"
        python = [head, *(["vilu_details"] if details and head == "vilu_head" else [])]
        graphs = ["clip_image"]
        if self.own:
            python.append("tokenize")
            graphs.append("clip_text")
        self.used = [prefix + name for name in (*python, *graphs)]
        loaded = {name: load_model(root / f"{prefix}{name}", models) for name in python}
        self.tower = _graph(root / f"{prefix}clip_image", threads)
        self.head = loaded[head]
        self.details_from = loaded.get("vilu_details", self.head)
        if self.own:
            models[f"{prefix}vilu_text"] = _Text(loaded["tokenize"], _graph(root / f"{prefix}clip_text", threads))
        self.batch_size = max(int(config["max_batch_size"]), 1)
        self.bank = self._bank(root, class_set, labels, version)
        for model in (self.head, self.details_from):
            # Every batch is answered from this version of the class set, though a newer one may be put meanwhile.
            model.candidates = lambda request, images, made: [self.bank] * images

    def _bank(self, root: Path, class_set: str | None, labels: Sequence[str] | None, version: int | None) -> Any:
        try:
            if labels is None:
                return self.head.store.get(class_set or "", version or 0)
            self.head.max_labels = MAX_LABELS
            return self.head._from_labels(np.array([label.encode() for label in labels], object), {})
        except UnicodeEncodeError:
            raise UserError("a label is not UTF-8") from None
        except ValueError as error:  # the model's own refusal of a request
            raise UserError(f"{root}: {first_line(error)}") from None

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Return image embeddings (B, D) float32 for pixels (B, S, S, 3) uint8."""
        embedding = np.asarray(self.tower.run([EMBEDDING], {"PIXELS": pixels})[0])
        bad = ~np.isfinite(embedding).all(axis=1)
        if bad.any():
            raise ValueError(f"the image tower gave {int(bad.sum())} embeddings that are not finite")
        return embedding

    def answer(self, embedding: np.ndarray) -> dict[str, np.ndarray]:
        """Return ANSWER for image embeddings (B, D), and EMBEDDING as the head reads it."""
        found = _run(self.head, {EMBEDDING: embedding}, (*ANSWER, *((EMBEDDING,) if self.own else ())))
        return {EMBEDDING: embedding} | found

    def more(self, embedding: np.ndarray, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Return DETAILS, EMBEDDING or OUTLIER for image embeddings (B, D)."""
        version = np.full((len(embedding), 1), self.bank.version, np.int32)
        return _run(self.details_from, {EMBEDDING: embedding, "CLASS_SET_VERSION": version}, wanted)


class _Text:
    """The ensemble `vilu_text`: prompts to their embeddings."""

    def __init__(self, tokenize: Any, graph: Any) -> None:
        self.tokenize, self.graph = tokenize, graph

    def execute(self, requests: list[Any]) -> list[Any]:
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


def question(inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> InferenceRequest:
    """Return a request to a model of the repository for these outputs."""
    return InferenceRequest("", [Tensor(name, array) for name, array in inputs.items()], wanted)


def _run(model: Any, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    (response,) = model.execute([question(inputs, wanted)])
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
