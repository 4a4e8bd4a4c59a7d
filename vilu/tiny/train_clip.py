"""Train the embedded CLIP: `python -m vilu.tiny.train_clip --output DIR`.

The script trains an open_clip model with CLIP's contrastive loss (arXiv 2103.00020) on the images and captions of the
"clip" split. The same seed gives the same weights on machines of the same kind. `--clip vilu-tiny-large` trains the
larger one of the two: it sees 128 pixels a side, and its captions name fewer look-alikes, because on the captions of
the small one no CLIP can be right where most of them are wrong (see `vilu.tiny.data`). Most of its steps see 64 pixels
a side, which is a quarter of the work, and the last ones see all 128, so that the tower fits them (arXiv 1906.06423).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import default_bpe
from PIL import Image
from safetensors.torch import save_file
from torch.func import functional_call

from vilu import atomic, tiny
from vilu.clip import load_clip
from vilu.errors import UserError
from vilu.preprocess.image import Transform, pixels
from vilu.seeding import seeded
from vilu.tiny import data

MERGES = 1500
CONTEXT = 24
MEAN, STD = 0.5, 0.25
Progress = Callable[[str, int, int], None]


def _config(size: int, width: int, layers: list[int]) -> dict[str, Any]:
    text = {"context_length": CONTEXT, "vocab_size": 512 + MERGES + 2, "width": 128, "heads": 4, "layers": 2}
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": size, "layers": layers, "width": width},
            "text_cfg": text,
        },
        "preprocess_cfg": {
            "size": size,
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


@dataclass(frozen=True)
class Plan:
    """What a CLIP is made of and trained on.

    config: open_clip's configuration.
    steps: number of training steps.
    coarse: share of these steps, the first ones, that see images of half the side; 0 to 1.
    misnamed: share of the captions that name a look-alike where captions do (see `vilu.tiny.data`); None for the
        shares of the small CLIP.
    """

    config: dict[str, Any]
    steps: int
    coarse: float = 0.0
    misnamed: float | None = None


PLANS = {
    tiny.NAME: Plan(_config(32, 24, [1, 1, 1, 1]), steps=600),
    tiny.LARGE: Plan(_config(128, 28, [1, 2, 2, 1]), steps=950, coarse=0.84, misnamed=0.2),
}


def write_tokenizer(path: Path) -> None:
    """Write the first merges of CLIP's own BPE in CLIP's file format."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[: MERGES + 1]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def _pixels(images: np.ndarray, transform: Transform) -> torch.Tensor:
    return torch.from_numpy(np.stack([pixels(Image.fromarray(image), transform) for image in images]))


@torch.no_grad()
def zero_shot(folder: Path, split: str, count: int = 2000) -> dict[str, float]:
    """Return CLIP's accuracy (0 to 1) on the digits and on `count` shapes of a split, each with its own class names."""
    clip = load_clip(f"local-dir:{folder}")
    result = {}
    for name, images in (("digits", data.digits(split)), ("shapes", data.shapes(split, count))):
        t = clip.class_set(images.names).text_embeddings
        v = clip.embed_images(_pixels(images.images, clip.transform).split(256))
        result[name] = float(((v @ t.T).argmax(dim=1).numpy() == images.labels).mean())
    return result


def train(
    folder: Path,
    seed: int,
    steps: int,
    batch_size: int,
    count: int,
    *,
    name: str = tiny.NAME,
    bfloat16: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Train a CLIP and write it in open_clip's layout. Nothing is written before the training has ended.

    Args:
        folder: folder to write.
        seed: seed of the data and the weights.
        steps: number of training steps.
        batch_size: number of images per step.
        count: number of shapes to draw. The number of rendered digits grows with it.
        name: which of `PLANS` to train.
        bfloat16: compute the image tower in bfloat16, which takes half of the time on a CPU with AMX.
        progress: called with (what, done, total) after each step.

    Raises:
        UserError: the folder cannot be written, or there are fewer images than one batch needs.
    """
    atomic.check_folder(folder)
    with tempfile.TemporaryDirectory() as staging:
        _train(Path(staging), PLANS[name], seed, steps, batch_size, count, bfloat16, progress)
        folder.mkdir(exist_ok=True)
        for path in sorted(Path(staging).iterdir()):
            atomic.write(folder / path.name, path.read_bytes())


def _embed(tower: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the embeddings (B, D) of images (B, 3, S, S) of the tower's size, or of half of it."""
    places = tower.attnpool.positional_embedding  # (1 + side * side, width), that of the mean first
    side = math.isqrt(len(places) - 1)
    replaced = {}
    if x.shape[-1] < 32 * side:
        grid = F.avg_pool2d(places[1:].T.reshape(1, -1, side, side), 2)
        replaced["attnpool.positional_embedding"] = torch.cat([places[:1], grid.reshape(places.shape[1], -1).T])
    embeddings: torch.Tensor = functional_call(tower, replaced, (x,))
    return embeddings


def _train(
    folder: Path,
    plan: Plan,
    seed: int,
    steps: int,
    batch_size: int,
    count: int,
    bfloat16: bool,
    progress: Progress,
) -> None:
    rng = np.random.default_rng(seed)
    write_tokenizer(folder / "bpe.txt.gz")
    (folder / "open_clip_config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
    tokenize = open_clip.SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"), context_length=CONTEXT)
    with seeded(seed):
        model = open_clip.CLIP(**plan.config["model_cfg"])

    progress("drawing", 0, 1)
    drawn = data.shapes("clip", count, seed, misnamed=plan.misnamed)
    renderings = [data.digits("clip", seed * 1000 + i, plan.misnamed) for i in range(max(1, count // 900))]
    size = plan.config["preprocess_cfg"]["size"]
    images = np.concatenate([part.images for part in (drawn, *renderings)])
    captions = [caption for part in (drawn, *renderings) for caption in part.captions]
    if len(images) < batch_size:
        raise UserError(f"a batch of {batch_size} needs as many images; there are {len(images)}")
    tokens = tokenize(captions)
    decay = [p for n, p in model.named_parameters() if p.ndim > 1]
    plain = [p for n, p in model.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.98),
    )
    warmup = max(1, steps // 20)
    coarse = round(plan.coarse * steps)
    if coarse:  # this layout of memory makes a step a quarter faster
        model.visual.to(memory_format=torch.channels_last)
    work = np.concatenate([np.ones(coarse), np.full(steps - coarse, 4.0 if coarse else 1.0)]).cumsum()
    for step in range(steps):
        done = (work[step] - work[0]) / work[-1]  # so the rate is still high where the images become larger
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * rate
        chosen = torch.from_numpy(rng.choice(len(images), batch_size, replace=False))
        shown = _pixels(images[chosen], Transform(size // 2 if step < coarse else size))
        x = (shown.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            v = _embed(model.visual, x).float()
        v = F.normalize(v, dim=-1)
        # Images with the same caption are all positives of that caption, which is encoded once.
        unique, which = tokens[chosen].unique(dim=0, return_inverse=True)
        t = F.normalize(model.encode_text(unique), dim=-1)
        logits = model.logit_scale.exp() * v @ t.T
        same = F.one_hot(which, len(unique)).float()
        to_text = F.cross_entropy(logits, which)
        to_image = F.cross_entropy(logits.T, (same / same.sum(dim=0)).T)
        loss = (to_text + to_image) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        progress(f"loss {loss.item():.3f}", step + 1, steps)
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors")


def main() -> None:
    """Train the embedded CLIP and print its zero-shot accuracy on the clip_val split."""
    parser = argparse.ArgumentParser(prog="python -m vilu.tiny.train_clip", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--clip", choices=PLANS, default=tiny.NAME, help="which one to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the weights (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, help="number of steps (default: the CLIP's own)")
    parser.add_argument("--batch-size", type=_positive, default=256, help="images per step (default: %(default)s)")
    parser.add_argument("--shapes", type=_positive, default=16000, help="shapes to draw (default: %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="compute the image tower in bfloat16")
    given = parser.parse_args()
    try:
        train(
            given.output,
            given.seed,
            given.steps or PLANS[given.clip].steps,
            given.batch_size,
            given.shapes,
            name=given.clip,
            bfloat16=given.bfloat16,
            progress=_print_progress,
        )
        for name, accuracy in zero_shot(given.output, "clip_val").items():
            print(f"{name}: zero-shot accuracy {accuracy:.1%} on clip_val")
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _print_progress(what: str, done: int, total: int) -> None:
    """Show progress on one line of a terminal. Each step overwrites the line."""
    if sys.stderr.isatty():
        print(f"\r{what}, {done} of {total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
