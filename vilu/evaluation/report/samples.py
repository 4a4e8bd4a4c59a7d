"""What a report shows of single images: a table by class, galleries of mistakes, and every image's scores in a file."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vilu.embeddings import BLOCK, EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.metrics import Floats, auroc, one_sided
from vilu.evaluation.results import OURS, Result
from vilu.preprocess.image import ImageError, Transform, decode, pixels

SIDE = 112  # pixels of a picture in a gallery
SHOWN = 12  # pictures in a gallery
FORMATS = ("csv", "parquet", "none")


class Images(Protocol):
    """The images of a data set, as `vilu.data.Source` has them."""

    def read(self, i: int) -> bytes | np.ndarray: ...
    def where(self, i: int) -> str: ...


@dataclass(frozen=True)
class Samples:
    """The N images of one result, one by one.

    rows: (N,) int64, place of each image in its data.
    labels: (N,) int64, class of each image; None for captions.
    answers: (N,) int64, class that CLIP answers; None for captions.
    class_names: names of the classes; may be empty.
    threshold: P(failure) below which the checkpoint accepts an answer.
    images: the images by their places, where they are at hand.
    """

    rows: np.ndarray
    labels: np.ndarray | None
    answers: np.ndarray | None
    class_names: tuple[str, ...]
    threshold: float
    images: Images | None = None

    def class_name(self, index: int) -> str:
        """Return the name of a class, or its number where the data has no names."""
        return self.class_names[index] if self.class_names else str(index)


@dataclass(frozen=True)
class ClassRow:
    """One class of a test set.

    name: name of the class.
    samples: number of images of the class.
    right: number of right answers to them.
    failure_probability: mean P(failure) of the head on them; None where there is no head.
    auc: AUC of the head within the class; None where all answers are right or all are wrong.
    mistaken_for: the most frequent wrong answer; "" where there is none.
    mistakes: how often it was given.
    """

    name: str
    samples: int
    right: int
    failure_probability: float | None
    auc: float | None
    mistaken_for: str
    mistakes: int


@dataclass(frozen=True)
class Shot:
    """One image of a gallery.

    where: the image's file or place.
    label: its class.
    answer: what CLIP answers.
    failure_probability: the head's P(failure).
    picture: PNG in base64, (SIDE, SIDE) as CLIP's transform crops it.
    """

    where: str
    label: str
    answer: str
    failure_probability: float
    picture: str


def samples_of(test: EmbeddedSet, result: Result, threshold: float, images: Images | None = None) -> Samples:
    """Return the single images of a result.

    Args:
        test: the test set that was evaluated.
        result: what `evaluate` made of it.
        threshold: P(failure) below which the checkpoint accepts an answer.
        images: the data that the test set was embedded from, where it is at hand.
    """
    rows = np.arange(len(test)) if test.rows is None else test.rows.cpu().numpy()
    rows = rows[: result.samples]
    if test.labels is None:
        return Samples(rows, None, None, (), threshold, images)
    text = test.text.normalised.float()
    answers = [(part.float() @ text.T).argmax(dim=1).cpu().numpy() for part in test.image.normalised.split(BLOCK)]
    return Samples(rows, test.labels.cpu().numpy(), np.concatenate(answers), test.class_names, threshold, images)


def by_class(result: Result, samples: Samples) -> list[ClassRow]:
    """Return a row for each class that has images, those with the most wrong answers first."""
    if samples.labels is None or samples.answers is None:
        return []
    failure = result.failure_probabilities.get(OURS)
    found = []
    for index in np.unique(samples.labels):
        of = samples.labels == index
        right = result.correct[of]
        wrong_answers, counts = np.unique(samples.answers[of][~right], return_counts=True)
        auc = None
        if failure is not None and not one_sided(right):
            auc = auroc(-failure[of], right)
        found.append(
            ClassRow(
                samples.class_name(int(index)),
                int(of.sum()),
                int(right.sum()),
                None if failure is None else float(failure[of].mean()),
                auc,
                samples.class_name(int(wrong_answers[counts.argmax()])) if len(counts) else "",
                int(counts.max()) if len(counts) else 0,
            )
        )
    return sorted(found, key=lambda row: (row.right - row.samples, row.name))


def galleries(result: Result, samples: Samples) -> list[tuple[str, list[Shot]]]:
    """Return (title, pictures): the mistakes with the least P(failure), and the right answers that are rejected.

    There is none where the images are not at hand, or without a head.
    """
    failure = result.failure_probabilities.get(OURS)
    if failure is None or samples.images is None or samples.labels is None or samples.answers is None:
        return []
    order = np.argsort(failure, kind="stable")
    mistakes = [i for i in order if not result.correct[i]]
    rejected = [i for i in order[::-1] if result.correct[i] and failure[i] >= samples.threshold]
    named = [
        (f"The most confident mistakes, of {len(mistakes):,}", mistakes),
        (f"Right answers that are rejected at {samples.threshold:.3g}, of {len(rejected):,}", rejected),
    ]
    shown = [(title, [_shot(int(i), failure, samples) for i in rows[:SHOWN]]) for title, rows in named if rows]
    return [(title, [shot for shot in shots if shot is not None]) for title, shots in shown]


def _shot(i: int, failure: Floats, samples: Samples) -> Shot | None:
    """Return the picture of image i; None where it cannot be read any more."""
    images, labels, answers = samples.images, samples.labels, samples.answers
    if images is None or labels is None or answers is None:
        return None
    place = int(samples.rows[i])
    try:
        content = images.read(place)
        small = Transform(SIDE)
        picture = pixels(Image.fromarray(content), small) if isinstance(content, np.ndarray) else decode(content, small)
    except (ImageError, OSError):
        return None
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    return Shot(
        images.where(place),
        samples.class_name(int(labels[i])),
        samples.class_name(int(answers[i])),
        float(failure[i]),
        base64.b64encode(png.getvalue()).decode(),
    )


def as_file(result: Result, samples: Samples, kind: str) -> bytes:
    """Return every image's scores as a CSV or Parquet file: one row an image, one column a method.

    Raises:
        UserError: Parquet without pyarrow.
    """
    columns: dict[str, Sequence[Any]] = {"row": samples.rows.tolist()}
    if samples.images is not None:
        names = map(samples.images.where, columns["row"])
        columns["source"] = [name.encode("utf-8", "replace").decode() for name in names]
    if samples.labels is not None and samples.answers is not None:
        columns["label"] = [samples.class_name(int(i)) for i in samples.labels]
        columns["answer"] = [samples.class_name(int(i)) for i in samples.answers]
    columns["correct"] = result.correct.tolist()
    for method, values in result.failure_probabilities.items():
        columns[f"failure_probability {method}"] = values.tolist()
    for method, values in result.confidences.items():
        columns[f"confidence {method}"] = values.tolist()
    if kind == "parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise UserError("Parquet needs a package: pip install 'vilu[parquet]'") from None
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return buffer.getvalue()
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()
