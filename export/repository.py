"""The models of the repository that hold no graph alone: their Python models, files and ensembles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vilu.preprocess.class_names
import vilu.preprocess.image
import vilu.preprocess.text
from vilu.class_set import ClassSet
from vilu.export.graphs import ANSWER
from vilu.export.limits import Limits
from vilu.export.model_config import Step, Tensors, write_config, write_ensemble
from vilu.export.outlier import OUTLIER_SCORE
from vilu.outlier import Outlier
from vilu.preprocess.image import Transform
from vilu.preprocess.text import TextTransform

TEMPLATES = Path(__file__).parent / "templates"

_ANSWER_TYPES = dict(zip(ANSWER, ("TYPE_STRING", "TYPE_INT32", "TYPE_FP32", "TYPE_FP32", "TYPE_BOOL"), strict=True))
ANSWER_TENSORS: Tensors = {name: (kind, [1]) for name, kind in _ANSWER_TYPES.items()}
CLASS_SET: Tensors = {"CLASS_SET": ("TYPE_STRING", [1])}  # NAME@VERSION; empty for candidates of the request's own
VERSION: Tensors = {"CLASS_SET_VERSION": ("TYPE_INT32", [1])}
HEAD_TENSORS: Tensors = {**ANSWER_TENSORS, **CLASS_SET, **VERSION}
LABELS: Tensors = {"LABELS": ("TYPE_STRING", [-1])}  # candidates of the request's own
DETAIL_TENSORS: Tensors = {
    "TOP_LABELS": ("TYPE_STRING", [-1]),
    "TOP_PROBABILITIES": ("TYPE_FP32", [-1]),
    "ENTROPY": ("TYPE_FP32", [1]),
    "DOCTOR": ("TYPE_FP32", [1]),
    "CONCEPTS": ("TYPE_STRING", [-1]),
    "CONCEPT_WEIGHTS": ("TYPE_FP32", [-1]),
}

# Class sets that are put while the server runs: classes of one, and sets.
MAX_CLASSES, MAX_CLASS_SETS = 100_000, 100
# Prompts whose text embeddings an open-vocabulary server keeps: 32 MB at D = 512.
KEPT_PROMPTS = 16384


@dataclass(frozen=True)
class Served:
    """What all models of one repository share.

    Attributes:
        class_set: the exported one, K names with embeddings (K, D).
        threshold: answers with a lower failure probability are accepted.
        fingerprint: of the CLIP; a class set made with another CLIP is refused.
        max_batch_size: the largest batch that the server forms.
        limits: what the server refuses.
        checkpoint: the checkpoint's hash, which a record of answers names.
        calibration: `vilu.evaluation.reference`'s summary in JSON, which answers are compared with; "" where there is
            none.
        outlier: the outlier score of the exported class set; None where the checkpoint has none.
    """

    class_set: ClassSet
    threshold: float
    fingerprint: str
    max_batch_size: int
    limits: Limits
    checkpoint: str = ""
    calibration: str = ""
    outlier: Outlier | None = None

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return int(self.class_set.text_embeddings.shape[1])

    @property
    def outlier_tensors(self) -> Tensors:
        """The output for the outlier score; empty where there is none."""
        return {} if self.outlier is None else {OUTLIER_SCORE: ("TYPE_FP32", [1])}

    @property
    def detail_tensors(self) -> Tensors:
        """The outputs that are computed only for a request that names them."""
        return {**DETAIL_TENSORS, "IMAGE_EMBEDDING": ("TYPE_FP32", [self.dim]), **self.outlier_tensors}

    @property
    def head_parameters(self) -> dict[str, str]:
        """The parameters of every model that answers or gives details."""
        threshold = None if self.outlier is None else self.outlier.threshold
        return {
            "threshold": repr(self.threshold),
            "checkpoint": self.checkpoint,
            "calibration": self.calibration,
            **({} if threshold is None else {"outlier_threshold": repr(threshold)}),
        }


def write_preprocess(
    folder: Path, transform: Transform, served: Served, more: Mapping[str, Transform] | None = None
) -> None:
    """Write the Python model that decodes images, with the same image code that the training used.

    Args:
        transform: makes PIXELS.
        more: other outputs -> their transforms, made from the same decoded image: for a cascade's later stages.
    """
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / "preprocess" / "model.py", version / "model.py")
    shutil.copyfile(Path(vilu.preprocess.image.__file__), version / "image.py")
    transforms = {"PIXELS": transform, **(more or {})}
    limits = {"max_bytes": str(served.limits.max_image_bytes), "max_pixels": str(served.limits.max_image_pixels)}
    stored = {
        name: {field: str(getattr(one, field)) for field in one.__dataclass_fields__} | limits
        for name, one in transforms.items()
    }
    parameters = stored.pop("PIXELS")
    if stored:
        parameters["more"] = json.dumps(stored)
    write_config(
        folder,
        backend="python",
        inputs={"IMAGE": ("TYPE_STRING", [1])},
        outputs={name: ("TYPE_UINT8", [one.size, one.size, 3]) for name, one in transforms.items()},
        max_batch_size=served.max_batch_size,
        limits=served.limits,
        parameters=parameters,
    )


def write_folded_head(folder: Path, served: Served) -> None:
    """Write the Python model around the folded head's graph; it answers from other class sets through ragged.onnx.

    `vilu.export.build` writes the graphs, model.onnx and ragged.onnx.
    """
    _write_head(folder, served, {}, HEAD_TENSORS)


def write_details_model(folder: Path, served: Served) -> None:
    """Write the Python model of an answer's details, over the class set that was answered from.

    It is a model, so a process, of its own: the text tower, which holds up vilu_embeddings, does not hold it up.
    `vilu.export.details` writes its graph, details.onnx.
    """
    _write_head(folder, served, VERSION, served.detail_tensors)


def _write_head(folder: Path, served: Served, inputs: Tensors, outputs: Tensors) -> None:
    write_head_files(folder, served.class_set, "vilu_head/cpu.py")
    write_config(
        folder,
        backend="python",
        inputs={"IMAGE_EMBEDDING": ("TYPE_FP32", [served.dim]), **inputs},
        outputs=outputs,
        max_batch_size=served.max_batch_size,
        limits=served.limits,
        parameters={
            **served.head_parameters,
            "fingerprint": served.fingerprint,
            "intra_op_thread_count": "1",
        },
        queue_limit=False,
    )


def write_embeddings(folder: Path, served: Served, *, labels: bool = True) -> None:
    """Write the Python model that takes embeddings, with a class set's candidates or each request's own.

    `vilu.export.open_vocabulary` and `vilu.export.details` write its graphs, ragged.onnx and details.onnx.

    Args:
        labels: whether it takes LABELS, which need the repository's text tower.
    """
    write_head_files(folder, served.class_set, "vilu_embeddings/model.py")
    shutil.copyfile(Path(vilu.preprocess.class_names.__file__), folder / "1" / "class_names.py")
    dim, limits = served.dim, served.limits
    candidates: Tensors = {**(LABELS if labels else {}), "TEXT_EMBEDDINGS": ("TYPE_FP32", [-1, dim])}
    write_config(
        folder,
        backend="python",
        inputs={"IMAGE_EMBEDDING": ("TYPE_FP32", [dim]), **candidates},
        outputs={**HEAD_TENSORS, **served.detail_tensors},
        max_batch_size=served.max_batch_size,
        limits=limits,
        parameters={
            **served.head_parameters,
            "templates": json.dumps(served.class_set.templates),
            "fingerprint": served.fingerprint,
            "text_batch_size": str(served.max_batch_size),
            "text_cache_prompts": str(KEPT_PROMPTS),
            "max_labels": str(limits.max_labels),
            "max_label_bytes": str(limits.max_label_bytes),
            "intra_op_thread_count": "1",
        },
        ragged=list(candidates),
    )


def write_head_files(folder: Path, class_set: ClassSet, model: str) -> None:
    """Write the template `model`, a model that answers by a head on a CPU, with its labels and class set; no graphs."""
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TEMPLATES / model, version / "model.py")
    for shared in ("head.py", "sets.py"):
        shutil.copyfile(TEMPLATES / "shared" / shared, version / shared)
    write_labels(version / "labels.txt", class_set.names)
    np.save(version / "text_embeddings.npy", class_set.text_embeddings.numpy(), allow_pickle=False)


def write_class_sets(folder: Path, served: Served, stages: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the Python model that lists class sets and, loaded with a change in its config, puts or removes one.

    Args:
        stages: of each later stage of a cascade its fingerprint, dim, templates and text_model.
    """
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / "class_sets" / "model.py", version / "model.py")
    shutil.copyfile(TEMPLATES / "shared" / "sets.py", version / "sets.py")
    shutil.copyfile(Path(vilu.preprocess.class_names.__file__), version / "class_names.py")
    write_labels(version / "labels.txt", served.class_set.names)
    write_config(
        folder,
        backend="python",
        inputs={"NAME": ("TYPE_STRING", [1])},
        outputs={"CLASS_SETS": ("TYPE_STRING", [1])},
        max_batch_size=served.max_batch_size,
        limits=served.limits,
        parameters={
            "templates": json.dumps(served.class_set.templates),
            "threshold": repr(served.threshold),
            "fingerprint": served.fingerprint,
            "dim": str(served.dim),
            "max_classes": str(MAX_CLASSES),
            "max_class_sets": str(MAX_CLASS_SETS),
            "max_label_bytes": str(served.limits.max_label_bytes),
            **({"stages": json.dumps(list(stages))} if stages else {}),
        },
    )


def write_tokenize(folder: Path, tokenizer: Path, transform: TextTransform, length: int, served: Served) -> None:
    """Write the Python model from strings to token ids.

    Args:
        tokenizer: the file that `write_tokenizer` wrote.
        transform: what `write_tokenizer` returned.
        length: L, how many ids a text has.
    """
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / "tokenize" / "model.py", version / "model.py")
    shutil.copyfile(Path(vilu.preprocess.text.__file__), version / "text.py")
    shutil.copyfile(tokenizer, version / "tokenizer.json")
    write_config(
        folder,
        backend="python",
        inputs={"TEXT": ("TYPE_STRING", [1])},
        outputs={"TOKENS": ("TYPE_INT64", [length])},
        max_batch_size=served.max_batch_size,
        limits=served.limits,
        parameters={
            "text_transform": json.dumps(vars(transform)),
            "max_text_bytes": str(served.limits.max_text_bytes),
        },
    )


def write_labels(path: Path, names: Sequence[str]) -> None:
    """Write class names, one a line, in the order of CLASS_INDEX."""
    path.write_text("".join(f"{name}\n" for name in names), "utf-8")


def write_answering(folder: Path, served: Served, *, head: str, details_from: str, candidates: bool = False) -> None:
    """Write an ensemble: IMAGE through preprocess, clip_image and a head to the answer, and a step for its details.

    Inside an ensemble a model cannot see which outputs a request asked for, so details are a step of their own, which
    Triton skips where none of them is asked for. Triton does that rightly only while no output of the ensemble is also
    an input of a step (it would count it twice and skip too much). So IMAGE_EMBEDDING comes out of the details step,
    and a tensor that is no output ties that step to the head: the version of the class set, or the embedding.

    Each step waits for the one before. Where two run at a time and one fails, tritonserver (2.51) may answer twice,
    which ends it, lets the other read the request after its memory is gone, and counts the request as in flight for
    ever (`EnsembleContext` in its core: `PrepareSteps`, `ScheduleSteps`).

    Args:
        head: the model that answers.
        details_from: the model that gives the details; it may be the same.
        candidates: the request brings LABELS of its own.
    """
    own = LABELS if candidates else {}
    chosen = {"IMAGE_EMBEDDING": "embedding", **dict.fromkeys(own, "LABELS")}
    tie = {"IMAGE_EMBEDDING": "answered"} if candidates else {"CLASS_SET_VERSION": "version"}
    optional = served.detail_tensors
    write_ensemble(
        folder,
        {"IMAGE": ("TYPE_STRING", [1]), **own},
        {**ANSWER_TENSORS, **CLASS_SET, **optional},
        [
            Step("preprocess", {"IMAGE": "IMAGE"}, {"PIXELS": "pixels"}),
            Step("clip_image", {"PIXELS": "pixels"}, {"IMAGE_EMBEDDING": "embedding"}),
            Step(head, chosen, {name: name for name in (*ANSWER_TENSORS, *CLASS_SET)} | tie),
            Step(details_from, chosen | tie, {name: name for name in optional}),
        ],
        served.max_batch_size,
    )


def write_text(folder: Path, dim: int, max_batch_size: int) -> None:
    """Write the ensemble from a text to its embedding (D,)."""
    write_ensemble(
        folder,
        {"TEXT": ("TYPE_STRING", [1])},
        {"TEXT_EMBEDDING": ("TYPE_FP32", [dim])},
        [
            Step("tokenize", {"TEXT": "TEXT"}, {"TOKENS": "tokens"}),
            Step("clip_text", {"TOKENS": "tokens"}, {"TEXT_EMBEDDING": "TEXT_EMBEDDING"}),
        ],
        max_batch_size,
    )
