"""What a client asks a server: `Question`, how answers are read from a reply, and the errors of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vilu.answers import Answer, RequestRefused
from vilu.errors import FailedError, UserError
from vilu.preprocess.class_names import names_problem

OUTPUTS = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")
STAGE = ("STAGE", "ESCALATION_FAILED")  # of a cascade
DETAILS = ("TOP_LABELS", "TOP_PROBABILITIES", "ENTROPY", "DOCTOR", "CONCEPTS", "CONCEPT_WEIGHTS")
OUTLIER = "OUTLIER_SCORE"


class ServerUnavailable(FailedError):  # noqa: N818 - an answer of the server, not a fault of the program
    """The server cannot be reached or is overloaded; the request was retried until its time was over."""


class DeadlineExceeded(ServerUnavailable):
    """No answer came within the client's timeout."""


class AccessDenied(RequestRefused):
    """The server wants a token, or another one."""


@dataclass(frozen=True)
class Question:
    """What is asked about images.

    Attributes:
        labels: candidate labels, answered by the ensemble `vilu_open`. None: the class set's.
        class_set: the name of a class set that the server has. None: the model's own.
        details: whether every Answer has class_set, top, entropy, doctor and concepts.
        embedding: whether every Answer has its image embedding.
        outlier_score: whether every Answer has its outlier score. Only a server whose checkpoint has one gives it.
        stage: whether every Answer has the stage of the cascade that gave it; no other model has one.

    Raises:
        TypeError: labels that are no sequence of strings, or a class set's name that is no string.
        UserError: a label that UTF-8 cannot hold, or one label alone, which would be the answer to any image.
    """

    labels: Sequence[str] | None = None
    class_set: str | None = None
    details: bool = False
    embedding: bool = False
    outlier_score: bool = False
    stage: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.labels, (str, bytes)):
            raise TypeError(f"labels must be a list of strings, not one string: {self.labels!r}")
        for label in self.labels or ():
            if not isinstance(label, str):
                raise TypeError(f"labels must be strings, not {label!r}")
        if self.labels is not None and len(self.labels) == 1:
            raise UserError(f"labels: {names_problem([*self.labels], 'label')}")
        if not isinstance(self.class_set, str | None):
            raise TypeError(f"class_set must be a string, not {self.class_set!r}")
        self.encoded_labels()

    def encoded_labels(self) -> list[bytes]:
        """The labels in UTF-8. Bytes that a command line could not decode go to the server as they were."""
        try:
            return [label.encode("utf-8", "surrogateescape") for label in self.labels or ()]
        except UnicodeEncodeError as error:
            raise UserError(f"label {error.object!r}: half a surrogate pair is not text") from None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output tensors to request."""
        class_set = ("CLASS_SET",) if self.class_set is not None or self.details else ()
        embedding = ("IMAGE_EMBEDDING",) if self.embedding else ()
        stage = STAGE if self.stage else ()
        outlier = (OUTLIER,) if self.outlier_score else ()
        return (*OUTPUTS, *stage, *class_set, *(DETAILS if self.details else ()), *embedding, *outlier)


def read_answers(result: Any, sources: Sequence[str], question: Question) -> list[Answer]:
    """The answers in an inference's result, one a source.

    Raises:
        RequestRefused: the result lacks an output.
    """
    found = {name: result.as_numpy(name) for name in question.outputs}
    missing = [name for name, column in found.items() if column is None]
    if missing:
        raise RequestRefused(f"the server did not answer {', '.join(missing)}")
    columns = [found[name].reshape(-1) for name in OUTPUTS]
    reply = result.get_response()
    ids = answer_ids(reply.get("id", "") if isinstance(reply, dict) else reply.id, len(sources))
    answers = []
    for row, (source, label, i, c, f, a) in enumerate(zip(sources, *columns, strict=True)):
        more: dict[str, Any] = {}
        if question.stage:
            more["stage"] = int(found["STAGE"][row, 0])
            more["escalation_failed"] = bool(found["ESCALATION_FAILED"][row, 0])
        if "CLASS_SET" in found:
            more["class_set"] = _text(found["CLASS_SET"][row, 0])
        if question.details:
            more["top"] = _pairs(found["TOP_LABELS"][row], found["TOP_PROBABILITIES"][row])
            more["concepts"] = _pairs(found["CONCEPTS"][row], found["CONCEPT_WEIGHTS"][row])
            more |= {name.lower(): float(found[name][row, 0]) for name in ("ENTROPY", "DOCTOR")}
        if question.embedding:
            more["embedding"] = found["IMAGE_EMBEDDING"][row]
        if question.outlier_score:
            more["outlier_score"] = float(found[OUTLIER][row, 0])
        answers.append(Answer(source, _text(label), int(i), float(c), float(f), bool(a), id=ids[row], **more))
    return answers


def answer_ids(request_id: str, images: int) -> list[str]:
    """The ids of a request's answers: the request's own for one image, ID/0, ID/1, ... for several; "" for none."""
    return [request_id] * images if images == 1 or not request_id else [f"{request_id}/{i}" for i in range(images)]


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _pairs(labels: np.ndarray, weights: np.ndarray) -> tuple[tuple[str, float], ...]:
    return tuple((_text(label), float(weight)) for label, weight in zip(labels, weights, strict=True))
