"""CLIP towers through open_clip: any of its models, a local folder, or the embedded default.

Models trained with the sigmoid loss (SigLIP) are served like all others: they choose one of K candidates, and the
confidence is max softmax(logit_scale · v · t). Their logit_bias is the same for every candidate and cancels in the
softmax, so it is not kept. Their sigmoid scores one pair of image and text; it is no probability among K candidates.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor, nn

from vilu import tiny
from vilu.checkpoint import Checkpoint, ClipSpec
from vilu.class_set import DEFAULT_TEMPLATES, ClassSet, check_names, prompts
from vilu.errors import UserError
from vilu.preprocess.image import RESIZE_MODES, Transform
from vilu.seeding import seeded

LOCAL = "local-dir:"
MAX_REASON = 300  # characters of a library's error message that our own message repeats


class Projected(NamedTuple):
    """A tower's last projection: its input and its output.

    normalised: output with rows of norm 1, (N, D).
    activation: input of the projection, (N, P).
    output: output of the projection, (N, D).
    """

    normalised: Tensor
    activation: Tensor
    output: Tensor


class Clip(nn.Module):
    """A CLIP model in float32 and evaluation mode, with the preprocessing of its inputs.

    Attributes:
        model: open_clip's model.
        spec: name, weights, logit scale and fingerprint of the model.
        transform: settings that turn image bytes into (S, S, 3) uint8 pixels.
        mean: mean (3,) that is subtracted from pixels in [0, 1].
        std: standard deviation (3,) that the difference is divided by.
        tokenize: open_clip's tokenizer, which turns N strings into (N, L) int64 token ids.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, spec: ClipSpec, tokenize: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.tokenize = tokenize
        config = open_clip.get_model_preprocess_cfg(model)
        size = config["size"]
        side = size if isinstance(size, int) else size[0]
        if not isinstance(size, int) and size[0] != size[1]:
            raise UserError(f"CLIP {spec.name}: image size {size} is not square")
        if config["resize_mode"] not in RESIZE_MODES:
            raise UserError(f"CLIP {spec.name}: resize mode {config['resize_mode']!r} is not supported")
        self.transform = Transform(
            side, config["resize_mode"], config["interpolation"], fill_color=config["fill_color"]
        )
        self.register_buffer("mean", torch.tensor(config["mean"]), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]), persistent=False)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the L2-normalised image_embedding (B, D) of uint8 pixels (B, S, S, 3)."""
        return F.normalize(self.model.encode_image(self._normalise(pixels)), dim=-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the L2-normalised text embeddings (N, D) of token ids (N, L)."""
        return F.normalize(self.model.encode_text(tokens), dim=-1)

    def project_pixels(self, pixels: Tensor) -> Projected:
        """Embed pixels (B, S, S, 3) uint8, and also return the input and output of the image tower's projection.

        Raises:
            UserError: the tower does not end in one linear projection, as SigLIP's does not.
        """
        headless, layer = _without(self.model, *_projection(self, "image"))
        return _project(headless.encode_image(self._normalise(pixels), normalize=False), layer)

    def project_tokens(self, tokens: Tensor) -> Projected:
        """Embed token ids (N, L), and also return the input and output of the text tower's projection.

        Raises:
            UserError: the tower does not end in one linear projection.
        """
        headless, layer = _without(self.model, *_projection(self, "text"))
        return _project(headless.encode_text(tokens, normalize=False), layer)

    def _normalise(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 255
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    @torch.no_grad()
    def embed_images(self, batches: Iterable[np.ndarray]) -> Tensor:
        """Return the image_embedding (N, D) of all images in batches of uint8 pixels (B, S, S, 3)."""
        return torch.cat([self.encode_pixels(torch.from_numpy(np.array(batch))) for batch in batches])

    @torch.no_grad()
    def class_set(self, names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> ClassSet:
        """Make a class set. Each row is the normalised mean of a class's normalised prompt embeddings.

        Args:
            names: K class names.
            templates: prompts with exactly one `{}` each.

        Raises:
            UserError: the names or the templates break a rule of `ClassSet`.
        """
        check_names(names)
        texts = prompts(names, templates)
        rows = [self.encode_tokens(self.tokenize(texts[i : i + 256])) for i in range(0, len(texts), 256)]
        grouped = torch.cat(rows).view(len(names), len(templates), -1)
        return ClassSet(tuple(names), tuple(templates), F.normalize(grouped.mean(dim=1), dim=-1))


def _projection(clip: Clip, side: str) -> tuple[tuple[str, ...], str]:
    """Find a tower's last projection, which is a matrix (P, D) or a linear layer.

    Returns:
        The names of the modules that lead to it from the model, and the name of the attribute that holds it.
    """
    if side == "text":
        tower: tuple[str, ...] = ("text",) if hasattr(clip.model, "text") else ()
        places: list[tuple[tuple[str, ...], str]] = [(tower, "text_projection"), (tower, "proj")]
    else:
        # A ViT has a matrix, a ResNet an attention pool, and a timm trunk a layer that open_clip adds.
        places = [(("visual",), "proj"), (("visual", "attnpool"), "c_proj"), (("visual", "head"), "proj")]
        if hasattr(clip.model.visual, "trunk") and not len(clip.model.visual.head):  # the trunk's own classifier
            trunk = ("visual", "trunk")
            places += [(trunk, "head"), (trunk, "fc"), (trunk, "classifier"), ((*trunk, "head"), "fc")]
    for path, name in places:
        holder = clip.model
        for step in path:
            holder = getattr(holder, step, None)
        layer = getattr(holder, name, None)
        if isinstance(layer, nn.Linear) or (isinstance(layer, Tensor) and layer.ndim == 2):
            return path, name
    raise UserError(f"CLIP {clip.spec.name}: its {side} tower does not end in one linear projection")


def _without(model: Any, path: tuple[str, ...], name: str) -> tuple[Any, Any]:
    """Return a copy of the model that ends before its projection, and the projection.

    The copy shares the weights. The model itself is not changed.
    """
    clone = copy.copy(model)
    clone._parameters, clone._modules = dict(model._parameters), dict(model._modules)
    if path:
        inner, layer = _without(getattr(model, path[0]), path[1:], name)
        setattr(clone, path[0], inner)
        return clone, layer
    layer = getattr(model, name)
    if name == "c_proj":
        # The attention pool reads this layer's weights without calling it.
        width = layer.in_features
        # Initialising the layer would draw from the caller's random numbers.
        same = nn.utils.skip_init(nn.Linear, width, width, device=layer.weight.device, dtype=layer.weight.dtype)
        with torch.no_grad():
            same.weight.copy_(torch.eye(width))
            same.bias.zero_()
        setattr(clone, name, same)
    else:
        # open_clip's own towers skip a projection that is None; the other towers always call it.
        setattr(clone, name, None if isinstance(layer, Tensor) or name == "text_projection" else nn.Identity())
    return clone, layer


def _project(activation: Tensor, layer: Any) -> Projected:
    output = layer(activation) if isinstance(layer, nn.Linear) else activation @ layer
    return Projected(F.normalize(output, dim=-1), activation, output)


def load_clip(name: str = tiny.NAME, pretrained: str | None = None, *, fingerprint: str = "") -> Clip:
    """Load a CLIP.

    Args:
        name: an open_clip model name ("ViT-B-32"), "local-dir:FOLDER" (open_clip's layout), or "vilu-tiny".
        pretrained: weights for an open_clip model name: an open_clip tag ("openai", which is downloaded), a local
            file, or "random", which is enough to measure speed and parity.
        fingerprint: SHA-256 that the weights must have; "" accepts any.

    Raises:
        UserError: the model is unknown, its weights are missing or do not fit, or their fingerprint differs.

    Examples:
        >>> clip = load_clip()
        >>> clip.spec.name, clip.transform.size
        ('vilu-tiny', 32)
        >>> clip.class_set(["cat", "dog"]).text_embeddings.shape
        torch.Size([2, 128])
    """
    source = f"{LOCAL}{tiny.FOLDER}" if name == tiny.NAME else name
    if source.startswith(LOCAL):
        if pretrained:
            raise UserError(f"CLIP {name}: brings its own weights, {pretrained!r} cannot be used with it")
    elif name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise UserError(f"CLIP {name!r} is not an open_clip model" + (f"; near: {', '.join(near)}" if near else ""))
    elif not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"CLIP {name}: name its weights: a file, 'random', or one of open_clip's tags ({tags})")
    try:
        with warnings.catch_warnings(), seeded(0):  # so that "random" weights are the same on every machine
            warnings.simplefilter("ignore")
            model = open_clip.create_model(
                source,
                pretrained=None if pretrained == "random" else pretrained,
                force_quick_gelu=_needs_quick_gelu(name, pretrained),
                require_pretrained=pretrained != "random",
            )
    except Exception as error:  # open_clip raises many types; the user gets one message for all
        raise UserError(f"CLIP {name}: weights cannot be loaded ({_reason(error)})") from None
    model.eval().requires_grad_(False)
    digest = _fingerprint(model)
    if fingerprint and fingerprint != digest:
        raise UserError(
            f"CLIP {name}: these weights ({digest[:12]}) are not those the head was trained on ({fingerprint[:12]})"
        )
    scale = float(model.logit_scale.detach().exp())
    return Clip(model, ClipSpec(name, pretrained, scale, digest), _tokenizer(source, name))


def load_clip_for(
    checkpoint: Checkpoint,
    where: str | os.PathLike[str] = "this checkpoint",
    name: str | None = None,
    pretrained: str | None = None,
    *,
    missing: str = "give --clip and --pretrained",
    load: Callable[..., Clip] = load_clip,
) -> Clip:
    """Load the CLIP that a checkpoint's head was trained on.

    Args:
        checkpoint: the checkpoint.
        where: name of the checkpoint in messages, such as its path.
        name: CLIP to load, as in `load_clip`; None stands for the one that the checkpoint names.
        pretrained: weights to load, as in `load_clip`. The checkpoint's weights are loaded if both are None.
        missing: advice in the message when neither the checkpoint nor `name` names a CLIP.
        load: function with `load_clip`'s arguments that loads it. A caller can pass one that keeps loaded models.

    Raises:
        UserError: nothing names a CLIP, `load` refuses it, or its weights are not those the head was trained on.
    """
    spec = checkpoint.clip
    if spec is None:
        if not name:
            raise UserError(f"{os.fspath(where)}: names no CLIP; {missing}")
        return load(name, pretrained)
    if not (name or pretrained):
        clip = load(spec.name, spec.pretrained, fingerprint=spec.fingerprint)
    else:
        clip = load(name or spec.name, pretrained)
    if spec.fingerprint not in ("", clip.spec.fingerprint):
        weights = spec.pretrained or "own weights"
        raise UserError(f"{os.fspath(where)}: was trained on CLIP {spec.name} ({weights}), not on these")
    return clip


def _reason(error: Exception) -> str:
    """Shorten a library's message to one line. A list of tensors that do not fit is cut to its first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
    return reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 1] + "…"


def _needs_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether the weights were trained with QuickGELU, as "openai" for "ViT-B-32" was. GELU changes the answers."""
    return bool((get_pretrained_cfg(name, pretrained or "") or {}).get("quick_gelu"))


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer(source: str, name: str) -> Callable[[list[str]], Tensor]:
    """Return open_clip's tokenizer, or a stand-in that raises UserError when called if its files cannot be loaded."""
    folder = Path(source.removeprefix(LOCAL))
    merges = folder / "bpe.txt.gz"
    try:
        # The folder's config cannot name its merges file, because open_clip wants an absolute path there.
        if source.startswith(LOCAL) and merges.is_file():
            text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
            options = {"context_length": text["context_length"], **text.get("tokenizer_kwargs", {})}
            return open_clip.SimpleTokenizer(bpe_path=str(merges), **options)
        return open_clip.get_tokenizer(source)
    except Exception as error:  # transformers and the hub raise many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return _MissingTokenizer(f"CLIP {name}: its tokenizer cannot be loaded ({reason[0]}){_advice(error, source)}")


def _advice(error: Exception, source: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"; pip install {error.name}"
    if source.startswith(LOCAL):
        return ""
    return "; put its tokenizer.json beside the weights in a folder of open_clip's layout and name local-dir:FOLDER"


class _MissingTokenizer:
    """A tokenizer that raises UserError when called. Loading does not fail, as the image tower needs no tokenizer."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, texts: list[str]) -> Tensor:
        raise UserError(self.message)
