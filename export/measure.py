"""Measure the written graphs on real inputs against the eager model, with the code that serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilu.export import parity
from vilu.export.cache import digest
from vilu.export.job import FEW_INPUTS, Job, Ticker
from vilu.export.outlier import FILE as OUTLIER
from vilu.export.outlier import OUTLIER_SCORE
from vilu.export.parity import Answers, Reference
from vilu.export.towers import KeptSession
from vilu.head import ViLUHead
from vilu.outlier import Outlier
from vilu.scores import Entropy
from vilu.serving.backends.onnxruntime import session

Outputs = dict[str, np.ndarray]
Head = Callable[[np.ndarray, int], Outputs]  # embeddings (N, D) and the batch size -> the head's outputs


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        figures: "graphs", "answers" and "batches", as they stand in parity.json.
        answers: provider -> the answers, for the providers that serve.
        eager: the eager model's answers for the same images.
    """

    figures: dict[str, Any]
    answers: dict[str, Answers]
    eager: Answers


def measure(job: Job, root: Path, tick: Ticker) -> Measured:
    """Run every graph below `root` and compare it with the eager model."""
    references = eager_references(job)
    head = _open_head(job, root)
    truth = references["vilu_head"]
    eager = _answers(truth.feed, truth.outputs)
    batch, label = job.max_batch_size, str(job.max_batch_size)
    graphs: dict[str, Any] = {name: {} for name in references}
    by_provider: dict[str, Any] = {}
    batches: dict[str, Any] = {}
    served: dict[str, Answers] = {}
    cpu_outputs: Outputs = {}
    for provider, serves in _providers(job):
        reference = references["clip_image"]
        reference = reference if serves else reference.first(FEW_INPUTS)
        tower = _open_tower(job, root, "clip_image", provider)
        outputs = parity.run_batches(tower, "PIXELS", reference.feed, batch)
        graphs["clip_image"][provider] = {label: parity.compare_outputs(outputs, reference)}
        tick(f"checking clip_image ({provider})")
        embedding = outputs["IMAGE_EMBEDDING"]
        head_outputs = head(embedding, batch)
        if provider == "cpu":
            cpu_outputs = {name: value[:FEW_INPUTS] for name, value in head_outputs.items()}
        answers = _answers(embedding, head_outputs)
        labels = job.sample.labels if serves else None
        by_provider[provider] = parity.compare_answers(answers, eager.first(len(reference)), labels)
        if serves:
            served[provider] = answers
            batches[provider] = _batch_effect(job, tower, head, answers, tick)
        else:
            by_provider[provider]["ranking"] = f"{len(reference)} images are too few to rank"
        tower.keep()
        texts = references["clip_text"] if serves else references["clip_text"].first(FEW_INPUTS)
        tower = _open_tower(job, root, "clip_text", provider)
        outputs = parity.run_batches(tower, "TOKENS", texts.feed, batch)
        tower.keep()
        graphs["clip_text"][provider] = {label: parity.compare_outputs(outputs, texts)}
        tick(f"checking clip_text ({provider})")
    head_row = parity.compare_outputs(head(truth.feed, batch), truth)
    graphs["vilu_head"]["folded" if job.cuda_archs else "cpu"] = {label: head_row}
    graphs["vilu_embeddings"] = {"cpu": {label: _measure_open_vocabulary(job, root, truth)}}
    details = root / "vilu_details" / "1" / "details.onnx"
    scale, text = job.clip.spec.logit_scale, job.class_set.text_embeddings
    row = measure_details(details, job.checkpoint.head, scale, text, truth.feed, job.runtime.cores)
    graphs["vilu_details"] = {"cpu": {label: row}}
    full = references["vilu_full"].first(FEW_INPUTS)
    if job.precision in ("float16", "int8"):  # the joined graph must answer as its own parts do
        full = Reference(full.input_name, full.feed, {name: cpu_outputs[name] for name in full.outputs})
    joined = session.open_session(root / "vilu_full" / "1" / "model.onnx", threads=session.cores())
    outputs = parity.run_batches(joined, "PIXELS", full.feed, batch)
    graphs["vilu_full"]["cpu"] = {label: parity.compare_outputs(outputs, full)}
    tick("checking vilu_full")
    figures = {"answers": by_provider, "batches": batches, "graphs": graphs}
    return Measured(figures, served, eager)


def _open_tower(job: Job, root: Path, name: str, provider: str) -> KeptSession:
    path = root / name / "1" / "model.onnx"
    output = "IMAGE_EMBEDDING" if name == "clip_image" else "TEXT_EMBEDDING"
    sample = digest(job.sample.pixels if name == "clip_image" else job.tokens[0].numpy())
    threads = min(job.runtime.cores, session.cores())  # more threads than cores would only wait for one another
    return KeptSession(path, output, provider, job.precision, threads, sample, job.cache)


def _batch_effect(job: Job, tower: parity.Session, head: Head, answers: Answers, tick: Ticker) -> dict[str, Any]:
    def answer(pixels: np.ndarray, size: int) -> Answers:
        v = parity.run_batches(tower, "PIXELS", pixels, size)["IMAGE_EMBEDDING"]
        return _answers(v, head(v, size))

    base = answers.first(job.max_batch_size)  # these images were computed in the first, full, batch
    sizes = parity.batch_sizes(len(base.class_index))
    return parity.batch_effect(answer, job.sample.pixels, base, sizes, lambda: tick("checking batch sizes"))


def _measure_open_vocabulary(job: Job, root: Path, truth: Reference) -> dict[str, Any]:
    """Compare the open-vocabulary head, with the class set as the candidates of every image."""
    opened = session.open_session(root / "vilu_embeddings" / "1" / "ragged.onnx", threads=session.cores())
    outputs = run_open_vocabulary(opened, truth.feed, job.class_set.text_embeddings.numpy())
    expected = {name: value for name, value in truth.outputs.items() if name in outputs}
    return parity.compare_outputs(outputs, Reference("IMAGE_EMBEDDING", truth.feed, expected))


def run_open_vocabulary(opened: parity.Session, embedding: np.ndarray, text_embeddings: np.ndarray) -> Outputs:
    """Run the graph of the open vocabulary for embeddings (N, D) over the same candidates (K, D)."""
    every = np.tile(np.array([[0, len(text_embeddings)]], np.int64), (len(embedding), 1))
    feed = {"IMAGE_EMBEDDING": embedding, "TEXT_EMBEDDINGS": text_embeddings, "CANDIDATES": every}
    return dict(zip(opened.outputs, opened.run(opened.outputs, feed), strict=True))


def measure_details(
    path: Path, head: ViLUHead, scale: float, t: torch.Tensor, embedding: np.ndarray, threads: int
) -> dict[str, Any]:
    """Compare the details with their formulas; not DOCTOR, a ratio without an upper bound, which tests cover.

    Args:
        path: the graph.
        scale: CLIP's factor on v · t.
        t: the class set (K, D).
        embedding: (N, D) image embeddings.
        threads: threads that run the graph.
    """
    v = torch.from_numpy(embedding)
    expected = {"PROBABILITIES": torch.softmax(scale * v @ t.T, dim=-1), "ENTROPY": Entropy().confidence(v, t, scale)}
    if "attended" in head.parts:
        query, key, _ = head.projections()
        expected["ATTENTION"] = torch.softmax(head.attention_scale * (v @ query.T) @ (t @ key.T).T, dim=-1)
    opened = session.open_session(path, threads=threads)
    found = opened.run(opened.outputs, {"IMAGE_EMBEDDING": embedding, "TEXT_EMBEDDINGS": t.numpy()})
    truth = {name: value.detach().reshape(len(v), -1).numpy() for name, value in expected.items()}
    return parity.compare_outputs(
        dict(zip(opened.outputs, found, strict=True)), Reference("IMAGE_EMBEDDING", embedding, truth)
    )


def measure_outlier(path: Path, outlier: Outlier, embedding: np.ndarray) -> dict[str, Any]:
    """Compare the outlier score's graph with its formula for image embeddings (N, D)."""
    opened = session.open_session(path, threads=1)
    found = opened.run(opened.outputs, {"IMAGE_EMBEDDING": embedding})
    truth = {OUTLIER_SCORE: outlier.score(torch.from_numpy(embedding))[:, None].numpy()}
    return parity.compare_outputs(
        dict(zip(opened.outputs, found, strict=True)), Reference("IMAGE_EMBEDDING", embedding, truth)
    )


def _providers(job: Job) -> list[tuple[str, bool]]:
    """The providers to measure, and whether each serves or is only what a server without OpenVINO falls back to."""
    if job.runtime.provider == "openvino":
        return [("openvino", True), ("cpu", False)]
    return [("cpu", True)]


def _open_head(job: Job, root: Path) -> Head:
    paths = [root / "vilu_head" / "1" / name for name in ("model.onnx", OUTLIER)]
    graphs = [session.open_session(path, threads=1) for path in paths if path.exists()]

    def run(embedding: np.ndarray, batch: int) -> Outputs:
        found: Outputs = {}
        if job.cuda_archs:
            found = parity.run_folded_head(job.head, job.class_set.names, embedding, batch)
        for graph in graphs:
            found |= parity.run_batches(graph, "IMAGE_EMBEDDING", embedding, batch)
        return found

    return run


def _answers(embedding: np.ndarray, outputs: parity.Arrays) -> Answers:
    outlier = outputs[OUTLIER_SCORE][:, 0] if OUTLIER_SCORE in outputs else None
    return Answers(embedding, outputs["CLASS_INDEX"][:, 0], outputs["FAILURE_PROBABILITY"][:, 0], outlier)


def eager_references(job: Job) -> dict[str, Reference]:
    """What the eager model, its head not folded, answers for the inputs of every graph."""
    t = job.class_set.text_embeddings
    feed, tokens = torch.from_numpy(job.sample.pixels), job.tokens[0]
    v = job.towers.eager(job.clip.encode_pixels, feed, 32)
    text = job.towers.eager(job.clip.encode_tokens, tokens, 64)
    with torch.no_grad():
        similarity = v @ t.T
        confidence = torch.softmax(job.clip.spec.logit_scale * similarity, dim=-1).amax(dim=-1)
        answer = {
            "CLASS_INDEX": similarity.argmax(dim=-1).int()[:, None].numpy(),
            "CONFIDENCE": confidence[:, None].numpy(),
            "FAILURE_PROBABILITY": job.checkpoint.head.failure_probability(v, t)[:, None].numpy(),
        }
    if job.checkpoint.outlier is not None:
        answer[OUTLIER_SCORE] = job.checkpoint.outlier.score(v)[:, None].numpy()
    labels = np.array(job.class_set.names, dtype=object)
    answer["LABEL"] = labels[answer["CLASS_INDEX"]]

    def predict(embedding: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(embedding) @ t.T).argmax(dim=-1).numpy()

    images, embedding = feed.numpy(), v.numpy()
    return {
        "clip_image": Reference("PIXELS", images, {"IMAGE_EMBEDDING": embedding}, predict),
        "vilu_head": Reference("IMAGE_EMBEDDING", embedding, answer),
        "vilu_full": Reference("PIXELS", images, answer),
        "clip_text": Reference("TOKENS", tokens.numpy(), {"TEXT_EMBEDDING": text.numpy()}, predict),
    }
