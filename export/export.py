"""`export`: write a model repository from a checkpoint, whole and within its parity budget, or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from vilu import __version__, atomic
from vilu.checkpoint import Checkpoint, load_checkpoint
from vilu.class_set import ClassSet
from vilu.clip import Clip, load_clip_for
from vilu.errors import UserError
from vilu.export import cuda_head, parity, repository, versions
from vilu.export import precision as precisions
from vilu.export import sample as samples
from vilu.export.graphs import ANSWER, HeadGraph, ImageGraph, TextGraph, merge_full, write_graph
from vilu.export.limits import Limits
from vilu.export.limits import write as write_limits
from vilu.export.open_vocabulary import write_details, write_ragged
from vilu.export.tokenizer import write_tokenizer
from vilu.kernels import FoldedHead, fold
from vilu.preprocess.image import MODES
from vilu.scores import Entropy
from vilu.serving.backends.onnxruntime import session

README = repository.TEMPLATES / "README.md"
# Inputs for what is made of proven parts, for the provider that servers fall back to, and for texts in float32: there
# an error shows on any input, whereas a reduced precision is judged by how many inputs it changes.
SAMPLE = 32
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One export: what is served, where, and what it is measured on."""

    checkpoint: Checkpoint
    clip: Clip
    class_set: ClassSet
    sample: samples.Sample
    max_batch_size: int
    runtime: repository.Runtime
    archs: tuple[int, ...]
    preprocess: str

    @property
    def precision(self) -> str:
        return self.runtime.precision

    @cached_property
    def folded(self) -> FoldedHead:
        text = self.class_set.text_embeddings
        return fold(self.checkpoint.head, text, logit_scale=self.clip.spec.logit_scale)

    @cached_property
    def head(self) -> HeadGraph:
        return HeadGraph(self.folded, self.checkpoint.threshold)

    @cached_property
    def texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (N, L) to measure on, and others to calibrate on."""
        measured, others = samples.texts(self.class_set.names, self.class_set.templates)
        count = SAMPLE if self.precision == "float32" else len(measured)
        return self.clip.tokenize(measured[:count]), self.clip.tokenize(others)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Sequence[int]]]:
        side, dim, length = self.clip.transform.size, self.checkpoint.head.dim, self.texts[0].shape[1]
        return {
            "PIXELS": ("TYPE_UINT8", [side, side, 3]),
            "IMAGE_EMBEDDING": ("TYPE_FP32", [dim]),
            "TOKENS": ("TYPE_INT64", [length]),
            "TEXT_EMBEDDING": ("TYPE_FP32", [dim]),
        }


class Ticker:
    """Counts steps for a progress bar whose total is an estimate."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress or (lambda *_: None), total, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        self.progress(what, min(self.done, self.total), self.total)


def export(
    checkpoint: Checkpoint | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    clip: Clip | None = None,
    images: Sequence[np.ndarray] | None = None,
    labels: Sequence[int] | None = None,
    precision: str = "float32",
    allow_loss: bool = False,
    max_batch_size: int = 32,
    device: str = "cpu",
    provider: str | None = None,
    cores: int | None = None,
    cuda_archs: Sequence[int] = cuda_head.ARCHS,
    engines: str = "/var/cache/vilu/engines",
    preprocess: str = "exact",
    version: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a Triton model repository.

    Args:
        checkpoint: a Checkpoint with its clip and class_set, or a path to one.
        output: the repository's folder; replaced whole, by renaming, once everything in it has been proven.
        clip: the loaded CLIP; by default the one the checkpoint names.
        images: at least 256 uint8 images (H, W, 3) to measure parity on; by default held-out digits and shapes
            of the embedded default. int8 takes 64 to 128 of them, drawn at random, for calibration alone.
        labels: the images' class indices, -1 where unknown: what the precision costs in AUC and FPR95 is then measured.
        precision: "float32", "float16" (GPU), "bfloat16" (CPU) or "int8", of the towers; the head is float32.
        allow_loss: keep an export that is over its precision's budget; parity.json then says so.
        max_batch_size: the largest batch the server forms.
        device: "cpu", or "gpu": every graph on the GPU, and the head as the fused kernel's cubins.
        provider: "openvino" or "cpu" (by default the first that is installed); "cuda" (the default) or "tensorrt".
        cores: what a CPU server may use; by default as many as this process may.
        cuda_archs: compute capabilities to compile the kernel for (90 is 9.0); no GPU is needed. What is proven of
            this head here is the folded form it is compiled from: cubins run on a GPU alone.
        engines: folder on the server for TensorRT's engines; they are code, so nobody else may write there.
        preprocess: "exact", or "fast": large JPEGs are decoded at reduced scale (vilu.preprocess.image.Transform).
        version: keep what the folder holds and add this export beside it, as the version that is served from the
            server's next start on (`vilu.export.versions.use` goes back); None: replace the folder.
        limits: what the server refuses.
        progress: called with (what, steps done, steps in all).

    Returns:
        What parity.json holds.

    Raises:
        UserError: an unknown device, provider or compute capability, a precision that they lack, a checkpoint without
            CLIP or class set, another CLIP than the head's, an output folder that is not a model repository or cannot
            be written, too few images, a version that is there already, or a graph over the parity budget. The old
            repository is then untouched.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    output = Path(output)
    _check_output(output)
    if version is not None:
        versions.check(output, version)
    runtime = _runtime(device, provider, precision, cores, engines)
    archs = tuple(sorted(set(cuda_archs))) if device == "gpu" else ()
    if device == "gpu":
        cuda_head.check_archs(archs)
    if preprocess not in MODES:
        raise UserError(f"preprocess must be one of {', '.join(MODES)}, got {preprocess!r}")
    if max_batch_size < 2:
        raise UserError(f"max_batch_size must be at least 2, got {max_batch_size}")
    if checkpoint.clip is None or checkpoint.class_set is None:
        raise UserError("this checkpoint holds no CLIP name and class set, so it cannot be served; train one with both")
    if clip is None:
        clip = load_clip_for(checkpoint)
    _check_width(checkpoint, clip, checkpoint.class_set)
    sample = samples.sample(clip, checkpoint.class_set.names, images, labels, calibrate=precision == "int8")
    job = Job(checkpoint, clip, checkpoint.class_set, sample, max_batch_size, runtime, archs, preprocess)
    with atomic.folder(output) as staging:
        tick = Ticker(progress, 12 + len(archs) + len(parity.batch_sizes(max_batch_size)))
        report = _write(job, staging, allow_loss, tick)
        write_limits(staging, limits or Limits())
        if version is not None:
            versions.add(staging, output, version)
        versions.keep_class_sets(output, staging)
    return report


def _runtime(device: str, provider: str | None, precision: str, cores: int | None, engines: str) -> repository.Runtime:
    if device not in ("cpu", "gpu"):
        raise UserError(f"device must be cpu or gpu, got {device!r}")
    openvino = session.has_openvino()
    if provider is None:
        provider = "cuda" if device == "gpu" else "openvino" if openvino else "cpu"
    precisions.check(precision, device, provider, has_openvino=openvino, has_bfloat16=session.has_bfloat16())
    if cores is not None and cores < 1:
        raise UserError(f"cores must be at least 1, got {cores}")
    return repository.Runtime(device, provider, precision, cores or session.cores(), engines)


def _check_width(checkpoint: Checkpoint, clip: Clip, class_set: ClassSet) -> None:
    side = clip.transform.size
    with torch.no_grad():
        width = clip.encode_pixels(torch.zeros(1, side, side, 3, dtype=torch.uint8)).shape[1]
    for what, found in (("CLIP " + clip.spec.name, width), ("its class set", class_set.text_embeddings.shape[1])):
        if found != checkpoint.head.dim:
            raise UserError(f"the head reads embeddings {checkpoint.head.dim} wide, {what} gives {found}")


def _check_output(output: Path) -> None:
    """Only a folder that an export wrote, or an empty one, is ever replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise UserError(f"{output}: exists and is not a folder")
    names = {entry.name for entry in output.iterdir()} - {"README.md", ".gitkeep"}
    if names and "parity.json" not in names:
        raise UserError(f"{output}: holds files that no export wrote; name an empty or new folder")


def _write(job: Job, root: Path, allow_loss: bool, tick: Ticker) -> dict[str, Any]:
    """Everything in the repository."""
    _write_graphs(job, root, tick)
    _write_configs(job, root)
    repository.write_labels(root / "labels.txt", job.class_set.names)
    shutil.copyfile(README, root / "README.md")
    measured, answers, reference = _measure(job, root, tick)
    report = _report(job, measured)
    problems = list(parity.failures(report))
    broken = [problem for problem in problems if parity.NOT_FINITE in problem]
    if broken or (problems and not allow_loss):
        first, more = (broken or problems)[0], len(problems) - 1
        raise UserError(f"export refused: {first}" + (f" (and {more} more)" if more else ""))
    report["over_budget"] = problems
    (root / "parity.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
    (root / "parity.md").write_text(parity.markdown(report), "utf-8")
    (root / "parity.png").write_bytes(parity.picture(answers, reference, job.precision))
    tick.progress("checked", tick.total, tick.total)
    return report


def _write_graphs(job: Job, root: Path, tick: Ticker) -> None:
    """clip_image and clip_text in the precision asked for, vilu_head in float32, vilu_full made of the first and it."""
    dim = job.checkpoint.head.dim
    pixels, (tokens, _) = torch.from_numpy(job.sample.pixels[:2]), job.texts
    fused = job.runtime.provider != "tensorrt"  # which knows none of ONNX Runtime's own operators
    paths = {name: root / name / "1" / "model.onnx" for name in ("clip_image", "clip_text", "vilu_head", "vilu_full")}
    image, text = {"IMAGE_EMBEDDING": [dim]}, {"TEXT_EMBEDDING": [dim]}
    write_graph(ImageGraph(job.clip), pixels, paths["clip_image"], "PIXELS", image, fused=fused)
    tick("writing clip_image")
    write_graph(TextGraph(job.clip), tokens[:2], paths["clip_text"], "TOKENS", text, fused=fused)
    tick("writing clip_text")
    for name, feed in (("clip_image", job.sample.calibration), ("clip_text", job.texts[1].numpy())):
        if job.precision == "float16":
            precisions.to_float16(paths[name])
        elif job.precision == "int8":
            entry = {"clip_image": "PIXELS", "clip_text": "TOKENS"}[name]
            symmetric = job.runtime.provider != "cpu"
            precisions.quantise(paths[name], {entry: feed}, symmetric=symmetric)
        tick(f"{job.precision}: {name}")

    head = paths["vilu_head"] if not job.archs else root / "head" / "1" / "model.onnx"
    answer = {name: [1] for name in ANSWER if name != "LABEL"}
    with torch.no_grad():
        embedding = job.clip.encode_pixels(pixels)
    write_graph(job.head, embedding, head, "IMAGE_EMBEDDING", answer, job.class_set.names)
    merge_full(paths["clip_image"], head, paths["vilu_full"])
    tick("writing vilu_head and vilu_full")
    if job.archs:
        shutil.rmtree(root / "head")
        threshold = job.checkpoint.threshold
        cuda_head.write_head(
            root / "vilu_head", job.folded, job.class_set.names, threshold, job.archs, job.max_batch_size, tick
        )


def _write_configs(job: Job, root: Path) -> None:
    for name, entry, outputs in (
        ("clip_image", "PIXELS", {"IMAGE_EMBEDDING": job.tensors["IMAGE_EMBEDDING"]}),
        ("clip_text", "TOKENS", {"TEXT_EMBEDDING": job.tensors["TEXT_EMBEDDING"]}),
        ("vilu_full", "PIXELS", repository.ANSWER_TENSORS),
    ):
        repository.write_graph_config(
            root / name,
            inputs={entry: job.tensors[entry]},
            outputs=outputs,
            max_batch_size=job.max_batch_size,
            runtime=job.runtime,
            tower=name.startswith("clip_"),
        )
    batch, spec, dim = job.max_batch_size, job.clip.spec, job.checkpoint.head.dim
    served = job.class_set, job.checkpoint.threshold, spec.fingerprint, batch
    repository.write_preprocess(root / "preprocess", replace(job.clip.transform, mode=job.preprocess), batch)
    repository.write_embeddings(root / "vilu_embeddings", *served)
    repository.write_details_model(root / "vilu_details", *served)
    repository.write_class_sets(root / "class_sets", *served)
    if not job.archs:  # else the fused kernel wrote its own
        repository.write_folded_head(root / "vilu_head", *served)
    plain = fold(job.checkpoint.head, job.class_set.text_embeddings, logit_scale=spec.logit_scale, layout="plain")
    for name in ("vilu_embeddings",) if job.archs else ("vilu_head", "vilu_embeddings"):
        write_ragged(plain, job.checkpoint.threshold, root / name / "1" / "ragged.onnx")
    for name in ("vilu_details", "vilu_embeddings"):
        write_details(plain, root / name / "1" / "details.onnx")
    tokenizer = root / "clip_text" / "1" / "tokenizer.json"
    transform = write_tokenizer(job.clip, tokenizer)
    repository.write_tokenize(root / "tokenize", tokenizer, transform, job.texts[0].shape[1], batch)
    repository.write_text(root / "vilu_text", dim, batch)
    repository.write_answering(root / "vilu", dim, batch, head="vilu_head", details_from="vilu_details")
    own = "vilu_embeddings"
    repository.write_answering(root / "vilu_open", dim, batch, head=own, details_from=own, candidates=True)


def _measure(job: Job, root: Path, tick: Ticker) -> tuple[dict[str, Any], dict[str, parity.Answers], parity.Answers]:
    """The report's figures; answers by provider and the eager model's, for the picture."""
    references = _references(job)
    batch = job.max_batch_size
    label = str(batch)
    head = _head(job, root)
    truth = references["vilu_head"]
    eager = _answers(truth.feed, truth.outputs)
    graphs: dict[str, Any] = {name: {} for name in references}
    answers: dict[str, parity.Answers] = {}
    figures: dict[str, Any] = {"answers": {}, "batches": {}}
    chained = None
    for provider, whole in _providers(job):
        count = len(job.sample.pixels) if whole else SAMPLE
        for name in ("clip_image", "clip_text"):
            reference = references[name].head(count)
            opened = session.open_session(
                root / name / "1" / "model.onnx", provider, job.precision, threads=job.runtime.cores
            )
            outputs = parity.run(opened, reference.input_name, reference.feed, batch)
            graphs[name][provider] = {label: parity.compare(outputs, reference)}
            tick(f"checking {name} ({provider})")
            if name == "clip_text":
                continue
            embedding = outputs["IMAGE_EMBEDDING"]
            answered = head(embedding, batch)
            if provider == "cpu":
                chained = {key: value[:SAMPLE] for key, value in answered.items()}
            answers[provider] = _answers(embedding, answered)
            cost = parity.cost(answers[provider], _first(eager, count), job.sample.labels if whole else None)
            if not whole:
                cost["ranking"] = f"{count} images are too few to rank"
            figures["answers"][provider] = cost
            if whole:

                def answer(pixels: np.ndarray, size: int, opened: Any = opened) -> parity.Answers:
                    v = parity.run(opened, "PIXELS", pixels, size)["IMAGE_EMBEDDING"]
                    return _answers(v, head(v, size))

                base = _first(answers[provider], batch)  # they rode in the first, full, batch
                sizes = parity.batch_sizes(len(base.class_index))
                figures["batches"][provider] = parity.batch_effect(
                    answer, reference.feed, base, sizes, lambda: tick("checking batch sizes")
                )
    assert chained is not None
    graphs["vilu_head"]["folded" if job.archs else "cpu"] = {label: parity.compare(head(truth.feed, batch), truth)}
    graphs["vilu_embeddings"] = {"cpu": {label: _measure_ragged(job, root, truth)}}
    graphs["vilu_details"] = {"cpu": {label: _measure_details(job, root, truth.feed)}}
    full = references["vilu_full"].head(SAMPLE)
    if job.precision in ("float16", "int8"):  # what the joined graph owes is its parts' own answer
        full = parity.Reference(full.input_name, full.feed, {name: chained[name] for name in full.outputs})
    opened = session.open_session(root / "vilu_full" / "1" / "model.onnx", threads=job.runtime.cores)
    graphs["vilu_full"]["cpu"] = {label: parity.compare(parity.run(opened, "PIXELS", full.feed, batch), full)}
    tick("checking vilu_full")
    return figures | {"graphs": graphs}, {p: answers[p] for p in figures["batches"]}, eager


def _measure_ragged(job: Job, root: Path, truth: parity.Reference) -> dict[str, Any]:
    """The head over candidates of a request's own, with the class set as those of every image."""
    opened = session.open_session(root / "vilu_embeddings" / "1" / "ragged.onnx", threads=job.runtime.cores)
    feed = {
        "IMAGE_EMBEDDING": truth.feed,
        "TEXT_EMBEDDINGS": job.class_set.text_embeddings.numpy(),
        "CANDIDATES": np.tile(np.array([[0, len(job.class_set)]], np.int64), (len(truth), 1)),
    }
    outputs = dict(zip(opened.outputs, opened.run(opened.outputs, feed), strict=True))
    expected = {name: value for name, value in truth.outputs.items() if name in outputs}
    return parity.compare(outputs, parity.Reference("IMAGE_EMBEDDING", truth.feed, expected))


def _measure_details(job: Job, root: Path, embedding: np.ndarray) -> dict[str, Any]:
    """What is told of an answer when asked for. DOCTOR is a ratio without an end: tests hold it to its formula."""
    head, scale = job.checkpoint.head, job.clip.spec.logit_scale
    v, t = torch.from_numpy(embedding), job.class_set.text_embeddings
    expected = {"PROBABILITIES": torch.softmax(scale * v @ t.T, dim=-1), "ENTROPY": Entropy().confidence(v, t, scale)}
    if "attended" in head.parts:
        query, key, _ = head.projections()
        expected["ATTENTION"] = torch.softmax(head.attention_scale * (v @ query.T) @ (t @ key.T).T, dim=-1)
    opened = session.open_session(root / "vilu_details" / "1" / "details.onnx", threads=job.runtime.cores)
    found = opened.run(opened.outputs, {"IMAGE_EMBEDDING": embedding, "TEXT_EMBEDDINGS": t.numpy()})
    truth = {name: value.detach().reshape(len(v), -1).numpy() for name, value in expected.items()}
    return parity.compare(
        dict(zip(opened.outputs, found, strict=True)), parity.Reference("IMAGE_EMBEDDING", embedding, truth)
    )


def _providers(job: Job) -> list[tuple[str, bool]]:
    """(provider, whether it is the one that serves): where OpenVINO is asked for, a server without it falls back."""
    if job.runtime.provider == "openvino":
        return [("openvino", True), ("cpu", False)]
    return [("cpu", True)]


def _head(job: Job, root: Path) -> Callable[[np.ndarray, int], dict[str, np.ndarray]]:
    if job.archs:
        return lambda embedding, batch: parity.run_head(job.head, job.class_set.names, embedding, batch)
    opened = session.open_session(root / "vilu_head" / "1" / "model.onnx", threads=1)
    return lambda embedding, batch: parity.run(opened, "IMAGE_EMBEDDING", embedding, batch)


def _answers(embedding: np.ndarray, outputs: parity.Arrays) -> parity.Answers:
    return parity.Answers(embedding, outputs["CLASS_INDEX"][:, 0], outputs["FAILURE_PROBABILITY"][:, 0])


def _first(answers: parity.Answers, count: int) -> parity.Answers:
    return parity.Answers(*(value[:count] for value in vars(answers).values()))


def _references(job: Job) -> dict[str, parity.Reference]:
    """What the eager model, head unfolded, answers for every graph's inputs."""
    t = job.class_set.text_embeddings
    feed, tokens = torch.from_numpy(job.sample.pixels), job.texts[0]
    with torch.no_grad():
        v = torch.cat([job.clip.encode_pixels(chunk) for chunk in feed.split(32)])
        text = torch.cat([job.clip.encode_tokens(chunk) for chunk in tokens.split(64)])
        similarity = v @ t.T
        confidence = torch.softmax(job.clip.spec.logit_scale * similarity, dim=-1).amax(dim=-1)
        answer = {
            "CLASS_INDEX": similarity.argmax(dim=-1).int()[:, None].numpy(),
            "CONFIDENCE": confidence[:, None].numpy(),
            "FAILURE_PROBABILITY": job.checkpoint.head.failure_probability(v, t)[:, None].numpy(),
        }
    labels = np.array(job.class_set.names, dtype=object)
    answer["LABEL"] = labels[answer["CLASS_INDEX"]]

    def predict(embedding: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(embedding) @ t.T).argmax(dim=-1).numpy()

    images, embedding = feed.numpy(), v.numpy()
    return {
        "clip_image": parity.Reference("PIXELS", images, {"IMAGE_EMBEDDING": embedding}, predict),
        "vilu_head": parity.Reference("IMAGE_EMBEDDING", embedding, answer),
        "vilu_full": parity.Reference("PIXELS", images, answer),
        "clip_text": parity.Reference("TOKENS", tokens.numpy(), {"TEXT_EMBEDDING": text.numpy()}, predict),
    }


def _report(job: Job, measured: dict[str, Any]) -> dict[str, Any]:
    runtime = job.runtime
    notes = []
    if runtime.device == "gpu":
        notes.append(
            "No GPU took part: ONNX Runtime's CPU provider rounds float16 as a GPU does, but sums in float32; "
            "the fused head was measured in the folded form it is compiled from."
        )
    if runtime.provider == "openvino":
        notes.append("vilu_full holds strings, so it stays on ONNX Runtime's CPU provider, with its clip_image.")
    return {
        "tolerance": precisions.HEAD.error,
        "precision": runtime.precision,
        "budget": precisions.BUDGETS[runtime.precision].as_dict(),
        "over_budget": [],
        "device": runtime.device,
        "provider": runtime.provider,
        "preprocess": job.preprocess,
        "threshold": job.checkpoint.threshold,
        "calibration": job.checkpoint.meta.get("calibration"),
        "clip": vars(job.clip.spec),
        "head": digest(job.checkpoint),
        "images": {"measured": len(job.sample.pixels), "calibrated": len(job.sample.calibration)},
        **measured,
        "notes": notes,
        "versions": {
            "vilu": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the head, class set and threshold that this repository serves."""
    import hashlib

    digest = hashlib.sha256(repr((checkpoint.head.config(), checkpoint.threshold)).encode())
    for tensor in checkpoint.head.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    if checkpoint.class_set is not None:
        digest.update(repr((checkpoint.class_set.names, checkpoint.class_set.templates)).encode())
        digest.update(checkpoint.class_set.text_embeddings.contiguous().numpy().tobytes())
    return digest.hexdigest()
