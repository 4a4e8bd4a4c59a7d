"""What a model repository holds, read from its files without loading a model. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vilu.errors import UserError

MOST_BYTES = 64 << 20  # of one file that is read; the longest are the names of a class set
PARITY, CONFIG = "parity.json", "config.pbtxt"
# Where a limit stands: (model, its parameter).
LIMITS = {
    "max_image_bytes": ("preprocess", "max_bytes"),
    "max_image_pixels": ("preprocess", "max_pixels"),
    "max_labels": ("vilu_embeddings", "max_labels"),
    "max_label_bytes": ("vilu_embeddings", "max_label_bytes"),
}


def about_repository(root: Path) -> dict[str, Any]:
    """Describe a model repository that `vilu export` wrote.

    Returns:
        JSON types: "clip", "class_set" (the exported one: count and names), "class_sets" (those that were put while a
        server ran), "threshold", "calibration", "outlier" (the outlier score's threshold and refused share; None
        without the score), "precision", "device", "provider", "preprocess", "answers" (what the export changes),
        "over_budget", "cascade" (None, or its "threshold", "front" model, "rule" and "calibration", and "stages": clip,
        precision, provider, threshold and answers of each later one), "models" (name, backend, versions, batch and
        instances of each), "served" (the version), "versions" (those that all models have), "limits", "head" (SHA-256)
        and "libraries".

    Raises:
        UserError: not such a repository, or a file of it is too large, cannot be read or is not what its name says.
    """
    report = _json(root / PARITY, f"{root}: not a repository that `vilu export` wrote (it has no {PARITY})")
    configs = {path.parent.name: load_config(path) for path in sorted(root.glob(f"*/{CONFIG}"))}
    if not configs:
        raise UserError(f"{root}: holds no models")
    models, every = [], []
    for name, config in configs.items():
        numbers = sorted(int(path.name) for path in (root / name).iterdir() if path.name.isdecimal())
        every.append(set(numbers))
        models.append(
            {
                "name": name,
                "backend": config.platform or config.backend,
                "versions": numbers,
                "max_batch_size": config.max_batch_size,
                "instances": sum(group.count for group in config.instance_group),
            }
        )
    versions = sorted(set.intersection(*every))
    policy = next((list(c.version_policy.specific.versions) for c in configs.values()), [])
    names = _text(root / "labels.txt").split("\n")[:-1]
    about: dict[str, Any] = {"clip": _dict(report.get("clip")), "class_set": {"classes": len(names), "names": names}}
    about["class_sets"] = _put_sets(root / "class_sets" / "sets")
    for key in ("threshold", "calibration", "precision", "device", "provider", "preprocess", "answers", "over_budget"):
        about[key] = report.get(key)
    about["outlier"] = _dict(report.get("outlier"))
    about["cascade"] = _cascade(_dict(report.get("cascade")))
    about["models"], about["versions"] = models, versions
    about["served"] = int(policy[0]) if policy else max(versions, default=None)
    about["limits"] = _limits(configs)
    about["head"], about["libraries"] = report.get("head"), _dict(report.get("versions"))
    return about


def _cascade(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    stages = found.get("stages")
    keys = ("clip", "precision", "provider", "threshold", "answers")
    later = [{key: one.get(key) for key in keys} for one in stages or () if isinstance(one, dict)]
    return {key: found.get(key) for key in ("threshold", "front", "rule", "calibration")} | {"stages": later}


def _limits(configs: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for limit, (model, key) in LIMITS.items():
        if model in configs and configs[model].parameters[key].string_value.isdecimal():
            found[limit] = int(configs[model].parameters[key].string_value)
    # `vilu serve` leaves these two to its door.
    for config in configs.values():
        policy = config.dynamic_batching.default_queue_policy
        if policy.max_queue_size:
            found["max_queue"] = policy.max_queue_size
            found["queue_seconds"] = policy.default_timeout_microseconds / 1e6
            break
    return found


def _put_sets(folder: Path) -> list[dict[str, Any]]:
    """The newest version of each class set that was put while a server ran, as templates/shared/sets.py keeps them."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        name, _, version = path.name.removesuffix(".removed").rpartition("@")
        if name and version.isdecimal():
            newest[name] = max(newest.get(name, (0, path)), (int(version), path))
    found = []
    for name, (number, path) in sorted(newest.items()):
        if path.name.endswith(".removed"):
            continue
        header = _parsed(path, _read(path, line=True))
        names = header.get("names")
        count = len(names) if isinstance(names, list) else 0
        found.append({"name": name, "version": number, "classes": count, "threshold": header.get("threshold")})
    return found


def _read(path: Path, *, line: bool = False) -> bytes:
    """Return a file's bytes, or those of its first line, but never more than MOST_BYTES."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: missing, or not a file")
        with path.open("rb") as file:
            data = file.readline(MOST_BYTES + 1) if line else file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{path}: larger than {MOST_BYTES >> 20} MB")
    return data


def _text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def _json(path: Path, missing: str) -> dict[str, Any]:
    if not path.exists():
        raise UserError(missing)
    return _parsed(path, _read(path))


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def _dict(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def load_config(path: Path) -> Any:
    """Read a config.pbtxt.

    Returns:
        A ModelConfig of Triton's protobuf.

    Raises:
        UserError: the file cannot be read, or it is not a model configuration.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(_text(path), model_config_pb2.ModelConfig())
    except (text_format.ParseError, RecursionError) as error:
        raise UserError(f"{path}: not a Triton model configuration ({error})") from None
