"""Answers for images without a server: CLIP and the head in eager PyTorch.

The answers are those of the exported model, because the same code reads the images (`vilu.preprocess.image`) and the
export is compared with this model.
"""

from __future__ import annotations

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from vilu.answers import TOP, Answer, ImageLike, opened
from vilu.checkpoint import Checkpoint, load_checkpoint
from vilu.class_set import DEFAULT_TEMPLATES, ClassSet
from vilu.clip import Clip, load_clip_for
from vilu.data.pipeline import AHEAD, ordered
from vilu.errors import UserError
from vilu.preprocess.image import ImageError
from vilu.scores import Doctor, Entropy

MISSING = "give the CLIP whose embeddings the head was trained on"
KEPT_LABELS = 16  # sets of labels whose text embeddings are kept from one call to the next


class Predictor:
    """Answer what is in images, with the probability that each answer is wrong.

    Args:
        checkpoint: a checkpoint, or the path of one.
        clip: the CLIP where it is not the one that the checkpoint names, or where it names none: a loaded `Clip`, or a
            name as `load_clip` takes it.
        pretrained: the weights of a CLIP that is given by name.
        classes: class names to choose from in place of the checkpoint's, or a `ClassSet` of the same CLIP.
        templates: prompts with one {} each, for `classes` and for labels; None stands for the checkpoint's.
        threshold: an answer is accepted below this failure probability; None stands for the checkpoint's.
        device: "cpu", "cuda", "cuda:1" ...; None stands for a GPU where there is one, else the CPU. A loaded `Clip` is
            moved there, and None leaves it where it is.
        batch_size: number of images that are embedded at a time.

    Raises:
        UserError: the checkpoint cannot be read, nothing names its CLIP, the CLIP or the classes do not fit, or the
            device is not there.

    Example:
        >>> import torch
        >>> from vilu import Checkpoint, Predictor, ViLUHead, load_clip
        >>> clip = load_clip()
        >>> head = ViLUHead(128)  # not trained; a path such as "head.safetensors" is what people give
        >>> predictor = Predictor(Checkpoint(head), clip=clip, classes=["red star", "blue circle"])
        >>> answer = predictor(np.zeros((32, 32, 3), np.uint8))
        >>> answer.label in ("red star", "blue circle"), 0 <= answer.failure_probability <= 1
        (True, True)
        >>> predictor.embed([np.zeros((32, 32, 3), np.uint8)]).shape
        (1, 128)
    """

    def __init__(
        self,
        checkpoint: Checkpoint | str | os.PathLike[str],
        *,
        clip: Clip | str | None = None,
        pretrained: str | None = None,
        classes: Sequence[str] | ClassSet | None = None,
        templates: Sequence[str] | None = None,
        threshold: float | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        where: str | os.PathLike[str] = "this checkpoint"
        if not isinstance(checkpoint, Checkpoint):
            where, checkpoint = checkpoint, load_checkpoint(checkpoint)
        self.checkpoint = checkpoint
        self.batch_size = _positive(batch_size)
        if isinstance(clip, Clip):
            self.device = clip.mean.device if device is None else _device(device)
            loaded = load_clip_for(checkpoint, where, clip.spec.name, load=lambda *_, **__: clip)
        else:
            self.device = _device(device)
            loaded = load_clip_for(checkpoint, where, clip, pretrained, missing=MISSING)
        self.clip = loaded.to(self.device)
        self.head = copy.deepcopy(checkpoint.head).to(self.device)  # whoever made the checkpoint may use its head, too
        self.threshold = np.float32(checkpoint.threshold if threshold is None else threshold)
        self._own = classes is None  # the outlier score knows the checkpoint's classes alone
        known = checkpoint.class_set
        self.templates = tuple(templates or (known.templates if known is not None else DEFAULT_TEMPLATES))
        self._kept: OrderedDict[tuple[str, ...], ClassSet] = OrderedDict()
        if classes is None and templates is not None and known is not None:
            classes = known.names
        if classes is None:
            self.class_set = known
        elif isinstance(classes, ClassSet):
            self.class_set = classes
            self._check_width("the class set's", classes.text_embeddings)
        else:
            self.class_set = self._embedded(classes)

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        labels: Sequence[str] | None = ...,
        *,
        details: bool = ...,
        embedding: bool = ...,
        batch_size: int | None = ...,
    ) -> Answer: ...
    @overload
    def __call__(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = ...,
        *,
        details: bool = ...,
        embedding: bool = ...,
        batch_size: int | None = ...,
    ) -> list[Answer]: ...
    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        details: bool = False,
        embedding: bool = False,
        batch_size: int | None = None,
    ) -> Answer | list[Answer]:
        """Answer for one image, or for each of several, in order.

        Args:
            images: a path, encoded bytes, a Pillow image or pixels (H, W, 3) uint8 in RGB; or several of these.
            labels: candidates to choose from in place of the class set. The outlier score, which knows only the
                checkpoint's classes, then refuses no answer.
            details: also give top, entropy, doctor and concepts of each answer.
            embedding: also give each image's embedding.
            batch_size: number of images that are embedded at a time; None stands for the predictor's.

        Returns:
            An Answer for one image, a list of them for several. An image that cannot be read has `error` set, and
            costs the others nothing.

        Raises:
            UserError: there are no labels and no class set, or `ClassSet` refuses the labels.
        """
        one = _is_one(images)
        each: Iterable[Any] = [images] if one else images  # type: ignore[assignment]
        found = list(self.stream(each, labels, details=details, embedding=embedding, batch_size=batch_size))
        return found[0] if one else found

    def stream(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        details: bool = False,
        embedding: bool = False,
        batch_size: int | None = None,
    ) -> Iterator[Answer]:
        """Answer any number of images, in order, while threads read the next ones; arguments as for a call."""
        class_set = self.class_set if labels is None else self._embedded(labels)
        if class_set is None:
            raise UserError("this checkpoint holds no class names: give labels, or classes to Predictor")
        own = self._own and labels is None
        return self._stream(images, class_set, details, embedding, self._size(batch_size), own)

    def embed(self, images: ImageLike | Iterable[ImageLike], *, batch_size: int | None = None) -> np.ndarray:
        """Return the L2-normalised image embeddings (N, D) float32 of N images, as a call takes them; N is 1 for one.

        Raises:
            RequestRefused: an image cannot be read.
        """
        each: Iterable[Any] = [images] if _is_one(images) else images  # type: ignore[assignment]
        rows = [np.empty((0, self.head.dim), np.float32)]
        for items, embedded in self._batches(each, self._size(batch_size)):
            for item in items:
                if isinstance(item, Answer):
                    item.raise_for_error()
            rows.append(embedded.cpu().numpy())
        return np.concatenate(rows[1:] or rows)

    def _stream(
        self, images: Iterable[ImageLike], class_set: ClassSet, details: bool, embedding: bool, size: int, own: bool
    ) -> Iterator[Answer]:
        for items, embedded in self._batches(images, size):
            rows = iter(self._answers(embedded, class_set, details, embedding, own))
            for item in items:
                yield item if isinstance(item, Answer) else Answer(item, **next(rows))

    def _batches(self, images: Iterable[ImageLike], size: int) -> Iterator[tuple[list[str | Answer], torch.Tensor]]:
        """Yield the images' names, or the errors in their place, and the embeddings (B, D) of those that were read."""
        read = ordered(self._read, enumerate(images), AHEAD * size)
        with closing(read):
            while batch := list(islice(read, size)):
                good = [found for _, found in batch if isinstance(found, np.ndarray)]
                embedded = torch.empty(0, self.head.dim, device=self.device)
                if good:
                    # On a GPU, cuDNN would round the inputs of convolutions to 10 bits.
                    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
                        embedded = self.clip.encode_pixels(torch.from_numpy(np.stack(good)).to(self.device))
                    self._check_width(f"those of CLIP {self.clip.spec.name}", embedded)
                yield [found if isinstance(found, Answer) else name for name, found in batch], embedded

    def _read(self, item: tuple[int, ImageLike]) -> tuple[str, np.ndarray | Answer]:
        """Return the name of an image, and its pixels (S, S, 3) uint8 or the error that says why there are none."""
        name, found = opened(item[1], item[0])
        if isinstance(found, Answer):
            return name, found
        try:
            return name, self.clip.transform(found)
        except ImageError as error:
            return name, Answer(name, error=str(error))

    @torch.no_grad()
    def _answers(
        self, v: torch.Tensor, class_set: ClassSet, details: bool, embedding: bool, own: bool
    ) -> list[dict[str, Any]]:
        """Return the fields of `Answer` for image embeddings (B, D); own: the classes are the checkpoint's."""
        if not len(v):
            return []
        t, scale = class_set.text_embeddings.to(self.device), self.clip.spec.logit_scale
        similarity = v @ t.T
        index = similarity.argmax(dim=-1).cpu().numpy()
        p = torch.softmax(scale * similarity, dim=-1)
        confidence = p.amax(dim=-1).cpu().numpy()
        failure = self.head.failure_probability(v, t).cpu().numpy()
        rows: list[dict[str, Any]] = [
            {
                "label": class_set.names[i],
                "class_index": int(i),
                "confidence": float(c),
                "failure_probability": float(f),
                "accept": bool(f < self.threshold),
            }
            for i, c, f in zip(index, confidence, failure, strict=True)
        ]
        outlier = self.checkpoint.outlier
        if outlier is not None:
            score = outlier.score(v.cpu())
            inside = score <= (math.inf if outlier.threshold is None or not own else outlier.threshold)
            for row, one, accept in zip(rows, score.tolist(), inside.tolist(), strict=True):
                row |= {"outlier_score": one, "accept": row["accept"] and accept}
        if details:
            weights = p[:, :0]
            if "attended" in self.head.parts:
                query, key, _ = self.head.projections()
                weights = torch.softmax(self.head.attention_scale * (v @ query.T) @ (t @ key.T).T, dim=-1)
            columns = zip(
                _largest(p, class_set.names),
                _largest(weights, class_set.names),
                Entropy().confidence(v, t, scale).tolist(),
                Doctor().confidence(v, t, scale).tolist(),
                strict=True,
            )
            for row, values in zip(rows, columns, strict=True):
                row |= zip(("top", "concepts", "entropy", "doctor"), values, strict=True)
        if embedding:
            for row, one in zip(rows, v.cpu().numpy(), strict=True):
                row["embedding"] = one
        return rows

    def _embedded(self, labels: Sequence[str]) -> ClassSet:
        """Return the class set of these labels. The last few sets are kept."""
        given = [] if isinstance(labels, str | bytes) else list(labels)
        if isinstance(labels, str | bytes) or not all(isinstance(label, str) for label in given):
            raise TypeError(f"labels must be a list of strings, not {labels!r}")
        key = tuple(label.strip() for label in given)
        if key not in self._kept:
            made = self.clip.class_set(key, self.templates)
            self._check_width(f"those of CLIP {self.clip.spec.name}", made.text_embeddings)
            self._kept[key] = made
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_LABELS:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _check_width(self, whose: str, rows: torch.Tensor) -> None:
        if rows.shape[1] != self.head.dim:
            raise UserError(f"the head reads embeddings {self.head.dim} wide, {whose} are {rows.shape[1]}")

    def _size(self, batch_size: int | None) -> int:
        return self.batch_size if batch_size is None else _positive(batch_size)


class CascadePredictor:
    """Answer by the rule of a cascade, without a server: a larger CLIP is asked where a smaller one is in doubt.

    Args:
        stages: a Predictor for each stage, the smallest CLIP first, over the same classes.
        threshold: an image goes on to the next stage where its failure probability is above this; what
            `vilu calibrate --cascade` chose.

    Raises:
        UserError: fewer than two stages, other classes, or a threshold out of range.
    """

    def __init__(self, stages: Sequence[Predictor], threshold: float) -> None:
        self.stages, self.threshold = list(stages), threshold
        names = [None if stage.class_set is None else stage.class_set.names for stage in self.stages]
        if len(names) < 2:
            raise UserError(f"a cascade needs at least two stages, got {len(names)}")
        if len(set(names)) > 1:
            raise UserError("the stages of a cascade have different classes")
        if not 0 <= threshold <= 1:
            raise UserError(f"a cascade's threshold must be in [0, 1], got {threshold}")

    def __call__(
        self, images: Iterable[ImageLike], labels: Sequence[str] | None = None, *, details: bool = False
    ) -> list[Answer]:
        """Answer for each image, in order; each answer has its `stage`. Arguments and errors are Predictor's."""
        given = list(images)
        found: list[Answer] = []
        going = list(range(len(given)))
        for number, stage in enumerate(self.stages, 1):
            answers = stage.stream([given[i] for i in going], labels, details=details)
            for i, answer in zip(going, answers, strict=True):
                if number == 1:
                    found.append(answer)
                found[i] = replace(answer, source=found[i].source, stage=None if answer.error else number)
            going = [i for i in going if found[i].failure_probability > self.threshold]  # never where there is an error
        return found


def _is_one(images: Any) -> bool:
    """Whether this is one image, not several. An array with four axes is several."""
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    return isinstance(images, str | bytes | os.PathLike | Image.Image)


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    return batch_size


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(name)!r} cannot be used ({reason})") from None
    return device


def _largest(weights: torch.Tensor, names: Sequence[str]) -> list[tuple[tuple[str, float], ...]]:
    """Return the TOP names with the largest weights (B, K), each with its weight; the first of equal ones."""
    found = weights.cpu().numpy()
    order = np.argsort(-found, axis=-1, kind="stable")[:, :TOP]
    return [
        tuple((names[i], float(row[i])) for i in indices) for row, indices in zip(found, order.tolist(), strict=True)
    ]
