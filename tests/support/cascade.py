"""A second, larger CLIP of another image size, width and dimension, with random weights, for cascades."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from vilu import Checkpoint, ViLUHead, load_clip, tiny
from vilu.clip import Clip
from vilu.preprocess.image import decode, pixels

DIM = 160
NEAR = 1e-4  # how far P(failure) may be from the eager model's


class Cascade(NamedTuple):
    """An exported cascade and what it was exported from."""

    root: Path
    checkpoints: tuple[Checkpoint, ...]
    clips: tuple[Clip, ...]
    threshold: float
    report: dict[str, Any]

    def eager(self, image: bytes, names: Sequence[str] | None = None) -> tuple[int, str, float, float, bool]:
        """The eager models' (stage, label, confidence, P(failure), near) by the rule; `names`: other candidates."""
        near = False
        for number, (checkpoint, clip) in enumerate(zip(self.checkpoints, self.clips, strict=True), 1):
            chosen = checkpoint.class_set
            assert chosen is not None
            if names is not None:
                chosen = clip.class_set(names, chosen.templates)
            t = chosen.text_embeddings
            v = clip.embed_images([decode(image, clip.transform)[None]])
            p = torch.softmax(clip.spec.logit_scale * v @ t.T, dim=1)
            failure = float(checkpoint.head.failure_probability(v, t))
            answer = chosen.names[int(p.argmax())], float(p.max()), failure
            last = number == len(self.clips)
            near |= not last and abs(failure - self.threshold) < NEAR
            if last or failure <= self.threshold:
                return number, *answer, near
        raise AssertionError("unreachable")


def failures(checkpoint: Checkpoint, clip: Clip, images: Iterable[np.ndarray]) -> torch.Tensor:
    """P(failure) (N,) of images by the eager model."""
    assert checkpoint.class_set is not None
    feed = np.stack([pixels(Image.fromarray(image), clip.transform) for image in images])
    with torch.no_grad():
        v = clip.encode_pixels(torch.from_numpy(feed))
        return checkpoint.head.failure_probability(v, checkpoint.class_set.text_embeddings)


def larger_clip(folder: Path) -> Clip:
    """The embedded CLIP's tokenizer, and towers of its kind with random weights."""
    folder.mkdir()
    config = json.loads((tiny.FOLDER / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = DIM
    config["model_cfg"]["vision_cfg"] |= {"image_size": 48, "width": 32}
    config["preprocess_cfg"]["size"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copyfile(tiny.FOLDER / "bpe.txt.gz", folder / "bpe.txt.gz")
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    return load_clip(f"local-dir:{folder}")


def stage(clip: Clip, names: tuple[str, ...], seed: int, threshold: float) -> Checkpoint:
    """A checkpoint with an untrained head, whose answers `threshold` splits."""
    torch.manual_seed(seed)
    head = ViLUHead(clip.class_set(names).text_embeddings.shape[1], attention_scale=clip.spec.logit_scale)
    return Checkpoint(head.eval().requires_grad_(False), clip.spec, clip.class_set(names), threshold=threshold)
