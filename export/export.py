"""`export`: write a model repository from a checkpoint, whole and within its parity budget, or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from vilu import __version__
from vilu.checkpoint import Checkpoint, load_checkpoint
from vilu.class_set import prompts
from vilu.clip import Clip, load_clip
from vilu.errors import UserError
from vilu.export import gpu, parity, repository
from vilu.export.graphs import ANSWER, FullGraph, HeadGraph, ImageGraph, TextGraph, write_graph
from vilu.image import pixels
from vilu.kernels import fold

README = repository.TEMPLATES / "README.md"
MIN_INPUTS = 256


def export(
    checkpoint: Checkpoint | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    clip: Clip | None = None,
    images: Sequence[np.ndarray] | None = None,
    max_batch_size: int = 32,
    device: str = "cpu",
    cuda_archs: Sequence[int] = gpu.ARCHS,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a Triton model repository, float32.

    Args:
        checkpoint: a Checkpoint with its clip and class_set, or a path to one.
        output: the repository's folder; replaced whole, by renaming, once everything in it has been proven.
        clip: the loaded CLIP; by default the one the checkpoint names.
        images: at least 256 uint8 images (H, W, 3) to measure parity on; by default held-out digits and shapes
            of the embedded default.
        max_batch_size: the largest batch the server forms.
        device: "cpu", or "gpu": every graph on the GPU, and the head as the fused kernel's cubins.
        cuda_archs: compute capabilities to compile the kernel for (90 is 9.0); no GPU is needed. What is proven of
            this head here is the folded form it is compiled from: cubins run on a GPU alone.
        progress: called with (what, steps done, steps in all).

    Returns:
        What parity.json holds.

    Raises:
        UserError: an unknown device or compute capability, a checkpoint without CLIP or class set, another CLIP than
            the head's, an output folder that is not a model repository or cannot be written, too few images, or a
            graph over the parity budget. The old repository is then untouched.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    output = Path(output)
    _check_output(output)
    if device not in ("cpu", "gpu"):
        raise UserError(f"device must be cpu or gpu, got {device!r}")
    archs = tuple(sorted(set(cuda_archs))) if device == "gpu" else ()
    if device == "gpu":
        gpu.check_archs(archs)
    if max_batch_size < 2:
        raise UserError(f"max_batch_size must be at least 2, got {max_batch_size}")
    if checkpoint.clip is None or checkpoint.class_set is None:
        raise UserError("this checkpoint holds no CLIP name and class set, so it cannot be served; train one with both")
    if clip is None:
        spec = checkpoint.clip
        clip = load_clip(spec.name, spec.pretrained, fingerprint=spec.fingerprint)
    if checkpoint.head.dim != checkpoint.class_set.text_embeddings.shape[1]:
        raise UserError(
            f"the head is {checkpoint.head.dim} wide, its class set {checkpoint.class_set.text_embeddings.shape[1]}"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    try:
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        report = _write(checkpoint, clip, staging, images, max_batch_size, archs, progress or (lambda *_: None))
        _replace(staging, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _check_output(output: Path) -> None:
    """Only a folder that an export wrote, or an empty one, is ever replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise UserError(f"{output}: exists and is not a folder")
    names = {entry.name for entry in output.iterdir()} - {"README.md", ".gitkeep"}
    if names and "parity.json" not in names:
        raise UserError(f"{output}: holds files that no export wrote; name an empty or new folder")


def _replace(staging: Path, output: Path) -> None:
    old = None
    if output.exists():
        old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.old."))
        os.rename(output, old / "repository")
    try:
        os.rename(staging, output)
    except OSError:
        if old is not None:
            os.rename(old / "repository", output)
        raise
    finally:
        if old is not None and output.exists():
            shutil.rmtree(old, ignore_errors=True)


def _write(
    checkpoint: Checkpoint,
    clip: Clip,
    root: Path,
    images: Sequence[np.ndarray] | None,
    max_batch_size: int,
    archs: Sequence[int],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Everything in the repository; `archs` is empty for CPU servers."""
    device = "gpu" if archs else "cpu"
    class_set = checkpoint.class_set
    assert class_set is not None
    feed = torch.from_numpy(_parity_pixels(clip, images))
    tokens = clip.tokenize(_parity_texts(class_set.names, class_set.templates))
    dim = class_set.text_embeddings.shape[1]
    folded = fold(checkpoint.head, class_set.text_embeddings, logit_scale=clip.spec.logit_scale)
    head = HeadGraph(folded, checkpoint.threshold)
    side = clip.transform.size
    answer = {name: [1] for name in ANSWER if name != "LABEL"}
    graphs: dict[str, tuple[torch.nn.Module, torch.Tensor, str, dict[str, list[int]]]] = {
        "clip_image": (ImageGraph(clip), feed[:2], "PIXELS", {"IMAGE_EMBEDDING": [dim]}),
        "vilu_head": (head, clip.encode_pixels(feed[:2]), "IMAGE_EMBEDDING", answer),
        "vilu_full": (FullGraph(clip, head), feed[:2], "PIXELS", answer),
        "clip_text": (TextGraph(clip), tokens[:2], "TOKENS", {"TEXT_EMBEDDING": [dim]}),
    }
    batches = tuple(sorted({1, 2, max_batch_size}))
    total = len(graphs) + len(archs) + 2 * len(graphs) * len(batches)
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, min(done, total), total)

    types = {"PIXELS": ("TYPE_UINT8", [side, side, 3]), "IMAGE_EMBEDDING": ("TYPE_FP32", [dim])}
    types |= {"TOKENS": ("TYPE_INT64", [tokens.shape[1]]), "TEXT_EMBEDDING": ("TYPE_FP32", [dim])}
    for name, (module, example, input_name, outputs) in graphs.items():
        answers = "CLASS_INDEX" in outputs
        labels = class_set.names if answers else None
        if name == "vilu_head" and archs:
            gpu.write_head(root / name, folded, class_set.names, checkpoint.threshold, archs, max_batch_size, tick)
            continue
        write_graph(module, example, root / name / "1" / "model.onnx", input_name, outputs, labels)
        repository.write_config(
            root / name,
            backend="onnxruntime",
            inputs={input_name: types[input_name]},
            outputs=repository.ANSWER_TENSORS if answers else {n: types[n] for n in outputs},
            max_batch_size=max_batch_size,
            device=device,
        )
        tick(f"writing {name}")
    repository.write_preprocess(root / "preprocess", clip.transform, max_batch_size)
    repository.write_ensemble(root / "vilu", max_batch_size)
    (root / "labels.txt").write_text("".join(f"{name}\n" for name in class_set.names), "utf-8")
    shutil.copyfile(README, root / "README.md")

    references = _references(checkpoint, clip, feed, tokens)
    measured = {
        name: parity.measure(
            root / name / "1" / "model.onnx", reference, batches, lambda name=name: tick(f"checking {name}")
        )
        for name, reference in references.items()
        if (root / name / "1" / "model.onnx").is_file()
    }
    if archs:
        measured["vilu_head"] = {"folded": parity.measure_head(head, class_set.names, references["vilu_head"], batches)}
    progress("checked", total, total)
    problems = list(parity.failures(measured))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"export refused: {problems[0]}{more}")
    report = {
        "tolerance": parity.TOLERANCE,
        "precision": "float32",
        "device": device,
        "threshold": checkpoint.threshold,
        "calibration": checkpoint.meta.get("calibration"),
        "clip": vars(clip.spec),
        "head": digest(checkpoint),
        "graphs": measured,
        "versions": {
            "vilu": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }
    (root / "parity.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _references(
    checkpoint: Checkpoint, clip: Clip, feed: torch.Tensor, tokens: torch.Tensor
) -> dict[str, parity.Reference]:
    """What the eager model, head unfolded, answers for every graph's inputs."""
    class_set = checkpoint.class_set
    assert class_set is not None
    t = class_set.text_embeddings

    def predict(embedding: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(embedding) @ t.T).argmax(dim=-1).numpy()

    with torch.no_grad():
        v = torch.cat([clip.encode_pixels(chunk) for chunk in feed.split(32)])
        text = torch.cat([clip.encode_tokens(chunk) for chunk in tokens.split(64)])
        similarity = v @ t.T
        confidence = torch.softmax(clip.spec.logit_scale * similarity, dim=-1).amax(dim=-1)
        answer = {
            "CLASS_INDEX": similarity.argmax(dim=-1).int()[:, None].numpy(),
            "CONFIDENCE": confidence[:, None].numpy(),
            "FAILURE_PROBABILITY": checkpoint.head.failure_probability(v, t)[:, None].numpy(),
        }
    labels = np.array(class_set.names, dtype=object)
    answer["LABEL"] = labels[answer["CLASS_INDEX"]]
    images, embedding = feed.numpy(), v.numpy()
    return {
        "clip_image": parity.Reference("PIXELS", images, {"IMAGE_EMBEDDING": embedding}, predict),
        "vilu_head": parity.Reference("IMAGE_EMBEDDING", embedding, answer),
        "vilu_full": parity.Reference("PIXELS", images, answer),
        "clip_text": parity.Reference("TOKENS", tokens.numpy(), {"TEXT_EMBEDDING": text.numpy()}, predict),
    }


def _parity_pixels(clip: Clip, images: Sequence[np.ndarray] | None) -> np.ndarray:
    from PIL import Image

    if images is None:
        from vilu.tiny import data

        half = MIN_INPUTS // 2
        images = [*data.digits("test").images[:half], *data.shapes("test", half).images]
    if len(images) < MIN_INPUTS:
        raise UserError(f"parity needs at least {MIN_INPUTS} images, got {len(images)}")
    return np.stack([pixels(Image.fromarray(image), clip.transform) for image in images])


def _parity_texts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    texts = prompts(names, templates)[:MIN_INPUTS]
    if len(texts) < MIN_INPUTS:
        from vilu.tiny import data

        texts += data.shapes("test", MIN_INPUTS - len(texts)).captions
    return texts


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
