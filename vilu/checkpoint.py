"""Checkpoints: this project's safetensors format, and by `vilu.authors` the authors' `.ckpt` files.

A file of format "vilu", version 1, is a safetensors file. Its tensors are the head's (`head.*`), the class set's
text_embeddings and, where there are any, the fingerprints of the training samples and the outlier score's tensors
(`outlier.*`). Its metadata holds one JSON document under the key "vilu", with the head's configuration, the CLIP, the
class names, the templates, the threshold and meta, and for an outlier score its number of prototypes, its threshold and
its refused share. Another key, "vilu.libraries", names what wrote the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vilu import atomic
from vilu.authors import check_finite, check_shapes, read_authors
from vilu.class_set import ClassSet
from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.fingerprints import COLUMNS, LIMIT
from vilu.head import ViLUHead
from vilu.outlier import Outlier

VERSION = 1
DEFAULT_THRESHOLD = 0.5
MAX_WIDTH = 1 << 16
TEXT = "class_set.text_embeddings"
SAMPLES = "training.fingerprints"
OUTLIER = "outlier."
OUTLIER_TENSORS = (f"{OUTLIER}mean", f"{OUTLIER}factor", f"{OUTLIER}prototypes")
LIBRARIES = "vilu.libraries"  # key of the file's metadata beside "vilu"; readers need not know it
ANOTHER_CLIP = 0.7  # a lower cosine of class embeddings means another CLIP; other prompts alone give a higher one


@dataclass(frozen=True)
class ClipSpec:
    """The CLIP that a head was trained on.

    name: open_clip model name, "vilu-tiny", "vilu-tiny-large", or "local-dir:FOLDER".
    pretrained: open_clip tag or weights file; None where the name already determines the weights.
    logit_scale: factor that CLIP puts on the cosine v · t before the softmax.
    fingerprint: SHA-256 of the weights in hexadecimal; "" where it is not known.
    """

    name: str
    pretrained: str | None = None
    logit_scale: float = 100.0
    fingerprint: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A head and everything that serving it needs.

    head: failure predictor.
    clip: CLIP that the head was trained on; None where it is not known, as in the authors' files.
    class_set: classes that the head was trained on; None for captions and for the authors' files.
    threshold: failure probability below which an answer is accepted.
    meta: notes that JSON can hold, such as the data, the recipe and the calibration.
    samples: fingerprints of the training samples, (M, 8) int16, from `vilu.fingerprints.remembered`; None where they
        are not known, as in the authors' files.
    outlier: score of images that show none of the classes; None where it was not asked for.
    """

    head: ViLUHead
    clip: ClipSpec | None = None
    class_set: ClassSet | None = None
    threshold: float = DEFAULT_THRESHOLD
    meta: Mapping[str, Any] = field(default_factory=dict)
    samples: Tensor | None = None
    outlier: Outlier | None = None


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint as a safetensors file that `load_checkpoint` reads.

    A failed write leaves no part of a file, and an earlier file at `path` is replaced only by a whole one.

    Args:
        checkpoint: what to write. Tensors are stored as float32.
        path: the file to write.

    Raises:
        UserError: a tensor holds a value that is not finite, or the path cannot be written.
    """
    path = Path(path)
    tensors = {
        f"head.{name}": t.detach().float().cpu().contiguous() for name, t in checkpoint.head.state_dict().items()
    }
    header: dict[str, Any] = {
        "version": VERSION,
        "head": checkpoint.head.config(),
        "clip": asdict(checkpoint.clip) if checkpoint.clip else None,
        "class_set": None,
        "threshold": checkpoint.threshold,
        "meta": dict(checkpoint.meta),
    }
    if checkpoint.class_set is not None:
        tensors[TEXT] = checkpoint.class_set.text_embeddings.detach().float().cpu().contiguous()
        header["class_set"] = {
            "names": list(checkpoint.class_set.names),
            "templates": list(checkpoint.class_set.templates),
        }
    if checkpoint.outlier is not None:
        score = checkpoint.outlier
        tensors |= {name: getattr(score, name.removeprefix(OUTLIER)).float().contiguous() for name in OUTLIER_TENSORS}
        header["outlier"] = {
            "prototypes": len(score.prototypes),
            "threshold": score.threshold,
            "refused": score.refused,
        }
    check_finite(path, tensors)
    if checkpoint.samples is not None:
        tensors[SAMPLES] = checkpoint.samples.cpu().contiguous()
    metadata = {"format": "pt", "vilu": json.dumps(header, allow_nan=False), LIBRARIES: json.dumps(_libraries())}
    with atomic.file(path) as part:
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be written ({error})") from None


def _libraries() -> dict[str, str]:
    """Return the versions of the libraries that a checkpoint depends on, as far as they are installed."""
    found = {}
    for name in ("vilu", "torch", "open_clip_torch", "numpy", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def written_with(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """Return the versions of the libraries that wrote a checkpoint; None where the file does not say.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(LIBRARIES, "null"))
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, RecursionError):  # the authors' files, and notes that are no JSON
        return None
    good = isinstance(found, dict) and all(isinstance(version, str) for version in found.values())
    return found if good else None


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 in hexadecimal of a checkpoint's head and CLIP, whatever its threshold: a record of answers names it."""
    known = {"head": checkpoint.head.config(), "clip": checkpoint.clip.fingerprint if checkpoint.clip else ""}
    sha = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.head.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def check_fits(
    path: Path, checkpoint: Checkpoint, data: EmbeddedSet, *, same_classes: bool = True, hint: str = ""
) -> None:
    """Check that a checkpoint can be used on embedded data.

    Args:
        path: name of the checkpoint in messages.
        checkpoint: the checkpoint.
        data: the embedded data. Captions have no classes to compare.
        same_classes: whether the data must have the checkpoint's classes.
        hint: end of the message about other classes.

    Raises:
        UserError: the embeddings have another width, the classes differ, or the class embeddings are another CLIP's.
    """
    width = data.image.normalised.shape[1]
    if checkpoint.head.dim != width:
        raise UserError(
            f"{path}: its head reads embeddings {checkpoint.head.dim} wide, those of {data.name} are {width}"
        )
    known = checkpoint.class_set
    if known is None or data.captions:
        return
    if same_classes and data.class_names:
        other = sorted(set(known.names) ^ set(data.class_names))
        if other:
            side = "only in the checkpoint" if other[0] in known.names else f"only in {data.name}"
            raise UserError(
                f"{path}: class names do not match those of {data.name}: {len(other)} differ, "
                f"e.g. {other[0]!r} {side}{hint}"
            )
    elif same_classes and len(known) != len(data.text):
        raise UserError(f"{path}: was trained on {len(known)} classes, {data.name} has {len(data.text)}{hint}")
    place = {name: i for i, name in enumerate(data.class_names)}
    shared = [(i, place[name]) for i, name in enumerate(known.names) if name in place]
    if shared:
        ours, theirs = (list(side) for side in zip(*shared, strict=True))
        cosine = (known.text_embeddings[ours] * data.text.normalised[theirs].float()).sum(dim=1).median()
        if float(cosine) < ANOTHER_CLIP:
            raise UserError(
                f"{data.name}: its class embeddings are not those of the CLIP that {path} was trained on "
                f"(median cosine {float(cosine):.2f})"
            )


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    keep_frozen: bool = False,
    n_iter_freeze_proj: int = 1000,
    logit_scale: float = 100.0,
    inputs: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of this project, or a `.ckpt` file of the authors (github.com/ykrmm/ViLU).

    The options apply only to the authors' files, which do not store these settings.

    Args:
        path: the file to read.
        keep_frozen: whether the authors' training kept the projections frozen. A frozen projection is the identity.
        n_iter_freeze_proj: number of training steps with frozen projections (1000 in the authors' CIFAR-10 script).
            The projections count only if the file's `iteration_count` is larger.
        logit_scale: scale of the head's attention logits.
        inputs: what the authors' MLP reads, one of `vilu.authors.OFFICIAL_INPUTS`; None: as the widths of the tensors
            say. Two forms with attention have an MLP 2·dim wide, so such a file needs this option.

    Returns:
        A Checkpoint whose head is float32, on the CPU and in evaluation mode.

    Raises:
        UserError: the file is missing, is not a checkpoint, is cut short or has another version, or a tensor is
            missing, unexpected, of the wrong shape or not finite. The message names the file and the tensor.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(Checkpoint(ViLUHead(16, hidden=(8,)), threshold=0.3), f"{folder}/head.safetensors")
        ...     checkpoint = load_checkpoint(f"{folder}/head.safetensors")
        >>> checkpoint.head.dim, checkpoint.threshold, checkpoint.clip
        (16, 0.3, None)
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if magic[:2] == b"PK":
        head, meta = read_authors(path, keep_frozen, n_iter_freeze_proj, logit_scale, inputs)
        return Checkpoint(head, meta=meta)
    return _load_vilu(path)


def _load_vilu(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("vilu")
            if text is None:
                raise UserError(f"{path}: a safetensors file, but not a ViLU checkpoint (no 'vilu' header)")
            header = _header(path, text)
            head = _empty_head(path, header["head"])
            expected = {f"head.{name}": tuple(t.shape) for name, t in head.state_dict().items()}
            classes = header["class_set"]
            if classes is not None:
                expected[TEXT] = (len(classes["names"]), head.dim)
            outlier = header.get("outlier")
            if outlier is not None:
                shapes = (head.dim,), (head.dim, head.dim), (outlier["prototypes"], head.dim)
                expected |= dict(zip(OUTLIER_TENSORS, shapes, strict=True))
            # Shapes are compared in the file's header, before a byte of tensor data is read.
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            samples = found.pop(SAMPLES, None)
            check_shapes(path, expected, found)
            if samples is not None:
                kind = file.get_slice(SAMPLES).get_dtype()
                if kind != "I16" or samples[1:] != (COLUMNS,) or samples[0] > LIMIT:
                    raise UserError(
                        f"{path}: tensor {SAMPLES} is {kind} {samples}, expected I16 (at most {LIMIT}, {COLUMNS})"
                    )
            tensors = {name: file.get_tensor(name) for name in found}
            known = None if samples is None else file.get_tensor(SAMPLES)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a checkpoint, or cut short ({error})") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, expected a float type")
    check_finite(path, tensors)
    weights = {n.removeprefix("head."): t.float() for n, t in tensors.items() if n.startswith("head.")}
    head.load_state_dict(weights, assign=True)
    head.eval().requires_grad_(False)
    class_set = score = None
    try:
        if classes is not None:
            class_set = ClassSet(tuple(classes["names"]), tuple(classes["templates"]), tensors[TEXT].float())
        if outlier is not None:
            mean, factor, prototypes = (tensors[name].float() for name in OUTLIER_TENSORS)
            score = Outlier(mean, factor, prototypes, outlier["threshold"], outlier["refused"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    clip = ClipSpec(**header["clip"]) if header["clip"] is not None else None
    return Checkpoint(head, clip, class_set, float(header["threshold"]), header["meta"], known, score)


def _header(path: Path, text: str) -> dict[str, Any]:
    """Return the JSON header. The type of every field is checked here, so later code can rely on it."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: the checkpoint's header is not JSON") from None

    def check(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{path}: the checkpoint's header has a bad {what}")

    def strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def number(value: Any) -> bool:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return good and abs(value) <= sys.float_info.max  # not NaN, and no whole number beyond what a float can hold

    check(isinstance(header, dict), "form")
    check(isinstance(header.get("version"), int), "version")
    if header["version"] != VERSION:
        raise UserError(f"{path}: checkpoint version {header['version']}, this program reads version {VERSION}")
    fields = {"version", "head", "clip", "class_set", "threshold", "meta"}
    check(set(header) - {"outlier"} == fields, "set of fields")
    check(isinstance(header["meta"], dict), "meta")
    check(number(header["threshold"]), "threshold")
    clip, classes = header["clip"], header["class_set"]
    if clip is not None:
        check(isinstance(clip, dict) and set(clip) == set(ClipSpec.__dataclass_fields__), "clip")
        check(isinstance(clip["name"], str) and isinstance(clip["fingerprint"], str), "clip")
        check(clip["pretrained"] is None or isinstance(clip["pretrained"], str), "clip.pretrained")
        check(number(clip["logit_scale"]) and clip["logit_scale"] > 0, "clip.logit_scale")
    if classes is not None:
        check(isinstance(classes, dict) and set(classes) == {"names", "templates"}, "class_set")
        check(strings(classes["names"]) and strings(classes["templates"]), "class_set")
    outlier = header.get("outlier")
    if outlier is not None:
        check(isinstance(outlier, dict) and set(outlier) == {"prototypes", "threshold", "refused"}, "outlier")
        count = outlier["prototypes"]
        check(isinstance(count, int) and not isinstance(count, bool) and count > 0, "outlier.prototypes")
        for name in ("threshold", "refused"):
            check(outlier[name] is None or number(outlier[name]), f"outlier.{name}")
    return header


def _empty_head(path: Path, config: Any) -> ViLUHead:
    """Return a head on torch's meta device: it has the header's shapes but takes no memory."""
    try:
        widths = [config["dim"], *config["hidden"]]
        if not all(isinstance(w, int) and not isinstance(w, bool) and 0 < w <= MAX_WIDTH for w in widths):
            raise ValueError(f"widths must be whole numbers from 1 to {MAX_WIDTH}")
        if len(widths) > 17:
            raise ValueError("more than 16 hidden layers")
        with torch.device("meta"):
            return ViLUHead(**config)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: the checkpoint's header has a bad head ({error})") from None
