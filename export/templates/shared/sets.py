"""Class sets that can change while the server runs. The export copies this file, which needs only NumPy, to each model.

A class set is one file, NAME@VERSION, in a folder that all models of the server read. The file holds one line of JSON
(names, threshold, templates and the CLIP's fingerprint) and then the text embeddings in float32. A cascade has several
CLIPs: `more` then lists the fingerprint and width of the later ones, whose embeddings follow. A link makes a file
appear whole, and it never changes. The server uses the highest version. A removal is also a version: an empty file
NAME@VERSION.removed.
"""

import json
import os
import re
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

DEFAULT = "default"  # name of the exported class set
OPEN = "open"  # name in the metrics for a request's own candidates
NAME = re.compile(r"[a-z0-9_-]{1,64}")
FILE = re.compile(r"([a-z0-9_-]{1,64})@(\d{1,9})(\.removed)?")
KEPT = 3  # versions of a set on disk, because a waiting request may still need an earlier one
COUNTED = 128  # largest number of class sets with metrics


class RequestError(ValueError):
    """A request cannot be answered. The message gives the reason in one line.

    code: Triton's error code; None for a bad request.
    """

    def __init__(self, message: str, code: Any = None) -> None:
        super().__init__(message)
        self.code = code


def error_response(error: Exception) -> Any:
    """Return Triton's response for an exception. An exception other than RequestError is logged with its traceback."""
    if isinstance(error, RequestError):
        code = pb_utils.TritonError.INVALID_ARG if error.code is None else error.code
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
    pb_utils.Logger.log_error("".join(traceback.format_exception(type(error), error, error.__traceback__)))
    message = f"{type(error).__name__}: {error}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))


def normalise(rows: Any, what: str) -> np.ndarray:
    """Return L2-normalised rows (N, D) float32.

    Raises:
        RequestError: a row is all zeros or not finite. The message names `what`.
    """
    rows = np.asarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise RequestError(f"{what} holds a value that is not finite")
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    if not (largest > 0).all():
        raise RequestError(f"{what} holds a row of zeros")
    rows = rows / largest  # the squares of very large or small rows would not be finite
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates that an image's label is chosen from.

    Attributes:
        labels: K names in UTF-8.
        rows: L2-normalised text embeddings (K, D) float32.
        threshold: failure probability below which an answer is accepted.
        name: name of the class set; empty for a request's own candidates.
        version: version of the class set; 0 for a request's own candidates.
    """

    labels: list[bytes]
    rows: np.ndarray
    threshold: float
    name: str = ""
    version: int = 0

    @property
    def qualified_name(self) -> str:
        """Return NAME@VERSION, or "" for a request's own candidates."""
        return f"{self.name}@{self.version}" if self.name else ""


def folder_of(args: dict[str, str]) -> Path:
    """Return the folder of class sets: $VILU_CLASS_SETS, or else a folder beside the model that writes them."""
    given = os.environ.get("VILU_CLASS_SETS")
    return Path(given) if given else Path(args["model_repository"]).parent / "class_sets" / "sets"


def versions(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Return each set's (version, path) pairs by name, newest last. A removed set's last file ends in .removed."""
    found: dict[str, list[tuple[int, Path]]] = {}
    if folder.is_dir():
        for entry in os.scandir(folder):
            match = FILE.fullmatch(entry.name)
            if match:
                found.setdefault(match[1], []).append((int(match[2]), folder / entry.name))
    return {name: sorted(files) for name, files in found.items()}


def served(found: dict[str, list[tuple[int, Path]]]) -> list[str]:
    """Return the names of the sets that `versions` found and nobody removed."""
    return sorted(name for name, files in found.items() if not files[-1][1].name.endswith(".removed"))


def requested_set(request: Any) -> str:
    """Return the class set that a request's parameters name, or "" where they name none."""
    try:
        parameters = request.parameters()
    except UnicodeDecodeError:
        raise RequestError("a parameter is not UTF-8") from None
    if parameters in ("", "{}"):
        return ""
    name = json.loads(parameters).get("class_set", "")
    if not isinstance(name, str):
        raise RequestError("class_set must be a string")
    return name


class Store:
    """The sets of a folder. A set is read when it is first needed, and the folder is read again when it changes."""

    def __init__(self, folder: Path, default: Any, fingerprint: str) -> None:
        self.folder, self.default, self.fingerprint = folder, default, fingerprint
        self.changed: int | None = None  # time in ns of the folder's last change; None means that it must be read again
        self.found: dict[str, list[tuple[int, Path]]] = {}
        self.read: dict[Path, Candidates] = {}

    def refresh(self) -> None:
        """Read the folder again if it has changed. If it has not, this takes about a microsecond."""
        try:
            changed = os.stat(self.folder).st_mtime_ns
        except FileNotFoundError:
            changed = 0
        if changed != self.changed:
            self.found = versions(self.folder)
            present = {path for files in self.found.values() for _, path in files}
            self.read = {path: value for path, value in self.read.items() if path in present}
            # A file system's clock ticks every few milliseconds, so a second change within a tick has the same time.
            self.changed = changed if time.time_ns() - changed > 1e9 else None

    def get(self, name: str, version: int = 0) -> Candidates:
        """Return a set.

        Args:
            name: name of the set; "" stands for the exported one.
            version: a version that is still kept; 0 stands for the newest.

        Raises:
            RequestError: there is no such set, or its version is no longer kept.
        """
        if name in ("", DEFAULT):
            if version not in (0, self.default.version):
                raise self._gone(DEFAULT, version)
            default: Candidates = self.default
            return default
        files = self.files(name)
        chosen = [file for file in files if file[0] == version] if version else files[-1:]
        if not chosen:
            raise self._gone(name, version)
        ((version, path),) = chosen
        if path not in self.read:
            self.read[path] = self._read(name, version, path)
        return self.read[path]

    def files(self, name: str) -> list[tuple[int, Path]]:
        """Return the (version, path) pairs of a set's kept versions, newest last.

        Raises:
            RequestError: there is no such set.
        """
        self.refresh()
        if name not in served(self.found):
            there = [DEFAULT, *served(self.found)]
            more = f" and {len(there) - 20} more" if len(there) > 20 else ""
            raise RequestError(f"class set {name[:64]!r} is not served; there are {', '.join(there[:20])}{more}")
        return self.found[name]

    def _gone(self, name: str, version: int) -> RequestError:
        message = f"class set {name}@{version} is no longer kept: ask again"
        return RequestError(message, pb_utils.TritonError.UNAVAILABLE)

    def _read(self, name: str, version: int, path: Path) -> Candidates:
        try:
            header, banks = read(path)
        except FileNotFoundError:
            raise self._gone(name, version) from None
        rows = banks.get(self.fingerprint)
        if rows is None or rows.shape[1] != self.default.rows.shape[1]:
            raise RequestError(f"class set {name}@{version} was made with another CLIP: put it again")
        threshold = self.default.threshold if header["threshold"] is None else header["threshold"]
        return Candidates([label.encode() for label in header["names"]], rows, threshold, name, version)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header of a set's file, and the rows (K, D) float32 of each CLIP by its fingerprint."""
    line, _, data = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    names, values = len(header["names"]), np.frombuffer(data, "<f4")
    banks = {}
    for one in reversed(header.get("more", [])):
        size = names * one["dim"]
        banks[one["fingerprint"]] = values[-size:].reshape(names, one["dim"])
        values = values[:-size]
    banks[header["fingerprint"]] = values.reshape(names, -1)
    return header, banks


class Tally:
    """Counts answers by class set in the server's metrics. It does nothing if the server keeps no metrics."""

    FAMILIES = (
        ("vilu_failure_probability", "Failure probabilities that were answered", "HISTOGRAM"),
        ("vilu_answers_total", "Images that were answered", "COUNTER"),
        ("vilu_rejected_total", "Images whose answer was rejected", "COUNTER"),
    )
    BUCKETS = tuple(round(0.05 * i, 2) for i in range(1, 21))

    def __init__(self, args: dict[str, str]) -> None:
        self.labels = {"model": args["model_name"], "version": args["model_version"]}
        self.families: list[Any] = []
        self.metrics: dict[str, list[Any]] = {}
        for name, description, kind in self.FAMILIES:
            try:
                kind = getattr(pb_utils.MetricFamily, kind)
                self.families.append(pb_utils.MetricFamily(name=name, description=description, kind=kind))
            except pb_utils.TritonModelException:
                self.families = []
                return

    def count(self, name: str, failure: np.ndarray, accept: np.ndarray) -> None:
        """Count answers of one class set. `failure` and `accept` are arrays of the same size."""
        if not self.families:
            return
        if name not in self.metrics:
            if len(self.metrics) == COUNTED:
                del self.metrics[next(iter(self.metrics))]
            labels = self.labels | {"class_set": name}
            histogram, *counters = self.families
            made = [histogram.Metric(labels=labels, buckets=list(self.BUCKETS))]
            self.metrics[name] = [*made, *(family.Metric(labels=labels) for family in counters)]
        histogram, answers, rejected = self.metrics[name]
        for value in failure.ravel().tolist():
            histogram.observe(value)
        answers.increment(failure.size)
        refused = int(accept.size - np.count_nonzero(accept))
        if refused:
            rejected.increment(refused)
