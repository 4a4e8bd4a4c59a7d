"""Load a CLIP: any of open_clip's models, a folder of open_clip or Hugging Face, or an embedded one."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transformer import QuickGELU
from torch import nn

from vilu import tiny
from vilu.checkpoint import Checkpoint, ClipSpec
from vilu.clip.files import read_weights
from vilu.clip.hugging_face import FOLDER, load_folder
from vilu.clip.model import Clip
from vilu.clip.tokenizer import LOCAL, load_tokenizer
from vilu.errors import UserError
from vilu.seeding import seeded

ARRAYS = (".npz", ".npy")  # Google's own SigLIP files, which open_clip reads itself
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # torch's messages have colours
MAX_REASON = 300  # characters of a library's error message that our own message repeats


def load_clip(name: str = tiny.NAME, pretrained: str | None = None, *, fingerprint: str = "") -> Clip:
    """Load a CLIP.

    Args:
        name: an open_clip model name ("ViT-B-32"), "local-dir:FOLDER" (open_clip's layout), "hf-dir:FOLDER" (what
            transformers' `save_pretrained` wrote of a CLIPModel or SiglipModel), or an embedded one, "vilu-tiny" or
            "vilu-tiny-large".
        pretrained: weights for an open_clip model name: an open_clip tag ("openai", which is downloaded), a local
            file (see `vilu.clip.files`), or "random", which is enough to measure speed and parity. OpenAI's own
            archives get QuickGELU, and other files do where the name asks for it ("ViT-B-32-quickgelu").
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
    for kind in (LOCAL, FOLDER):
        if name.startswith(kind):
            name = kind + _absolute(name.removeprefix(kind))
    source = f"{LOCAL}{tiny.FOLDERS[name]}" if name in tiny.FOLDERS else name
    if source.startswith((LOCAL, FOLDER)) and pretrained:
        raise UserError(f"CLIP {name}: brings its own weights, {pretrained!r} cannot be used with it")
    if source.startswith(FOLDER):
        with seeded(0):  # the weights that are made first draw from the caller's random numbers
            model = load_folder(Path(source.removeprefix(FOLDER)))
    elif source.startswith(LOCAL):
        model = _create(name, source)
    elif name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise UserError(f"CLIP {name!r} is not an open_clip model" + (f"; near: {', '.join(near)}" if near else ""))
    elif not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"CLIP {name}: name its weights: a file, 'random', or one of open_clip's tags ({tags})")
    elif pretrained == "random":
        model = _create(name, name, required=False, preprocessing=_preprocessing(name))
    elif get_pretrained_cfg(name, pretrained):
        model = _create(name, name, pretrained, quick_gelu=_needs_quick_gelu(name, pretrained))
    else:
        pretrained = _absolute(pretrained)
        model = _create_from_file(name, pretrained)
    model.eval().requires_grad_(False)
    digest = _fingerprint(model)
    value = model.get_parameter("logit_scale").detach()
    scale = float(value.exp())
    if not 0 < scale < float("inf"):
        raise UserError(
            f"CLIP {name} ({pretrained or 'own weights'}): logit_scale must be the logarithm of a factor, not {value:g}"
        )
    clip = Clip(model, ClipSpec(name, pretrained, scale, digest), load_tokenizer(source, name))
    if not _same(clip, ClipSpec(name, pretrained, scale, fingerprint)):
        raise UserError(
            f"CLIP {name}: these weights ({digest[:12]}) are not those the head was trained on ({fingerprint[:12]})"
        )
    return clip


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
    if not _same(clip, spec):
        weights = spec.pretrained or "own weights"
        raise UserError(f"{os.fspath(where)}: was trained on CLIP {spec.name} ({weights}), not on these")
    return clip


def _absolute(path: str) -> str:
    """A path that means the same in every folder, because checkpoints store it."""
    return os.path.abspath(os.path.expanduser(path))


def _create_from_file(name: str, path: str) -> nn.Module:
    if not os.path.exists(path):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"CLIP {name}: no weights file {path}, and not one of open_clip's tags either ({tags})")
    preprocessing = _preprocessing(name)
    if path.endswith(ARRAYS):
        return _create(name, name, path, preprocessing=preprocessing)
    weights = read_weights(Path(path))
    model = _create(name, name, required=False, quick_gelu=weights.openai, preprocessing=preprocessing)
    weights.load_into(model, name)
    return model


def _create(
    name: str,
    source: str,
    pretrained: str | None = None,
    *,
    required: bool = True,
    quick_gelu: bool = False,
    preprocessing: dict[str, Any] | None = None,
) -> nn.Module:
    """Make open_clip's model, with its weights where they are required.

    Args:
        name: name of the CLIP in messages.
        source: open_clip's name of the model or the folder.
        pretrained: a tag, or one of Google's files.
        required: whether to raise where open_clip finds no weights.
        quick_gelu: whether to use QuickGELU where the model's configuration does not ask for it.
        preprocessing: image preprocessing that replaces open_clip's.
    """
    try:
        with (
            warnings.catch_warnings(),
            _without_a_false_alarm(),
            seeded(0),
        ):  # so that "random" weights are the same on every machine
            warnings.simplefilter("ignore")
            model: nn.Module = open_clip.create_model(
                source,
                pretrained=pretrained,
                force_quick_gelu=quick_gelu,
                require_pretrained=required,
                force_preprocess_cfg=preprocessing,
                pretrained_hf=False,  # the whole CLIP's weights follow, or none are wanted
            )
    except Exception as error:  # open_clip raises many types; the user gets one message for all
        raise UserError(f"CLIP {name}: weights cannot be loaded ({_reason(error)})") from None
    return model


@contextlib.contextmanager
def _without_a_false_alarm() -> Iterator[None]:
    """Leave out open_clip's warning of random weights: a file's weights follow, or random ones are wanted."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root.addHandler(handler)  # without any handler, logging.warning would add one that prints
    root.addFilter(wanted)
    try:
        yield
    finally:
        root.removeFilter(wanted)
        root.removeHandler(handler)


def _preprocessing(name: str) -> dict[str, Any]:
    """How all published weights of a model want its images; empty where they differ, for open_clip's default."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [{key: (get_pretrained_cfg(name, tag) or {}).get(key) for key in PREPROCESSING} for tag in tags]
    return known[0] if known and all(found == known[0] for found in known) else {}


def _reason(error: Exception) -> str:
    """Shorten a library's message to one line. A list of tensors that do not fit is cut to its first."""
    lines = [line.strip() for line in ESCAPES.sub("", str(error)).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
    return reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 1] + "…"


def _needs_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether the name or tag asks for QuickGELU, as "openai" does for "ViT-B-32". GELU changes the answers."""
    config = _config(name) or {}
    return bool(config.get("quick_gelu") or (get_pretrained_cfg(name, pretrained or "") or {}).get("quick_gelu"))


def _config(name: str) -> dict[str, Any] | None:
    """open_clip's configuration of a model; None where it has none."""
    try:
        config: dict[str, Any] | None = open_clip.get_model_config(name)
    except (OSError, ValueError):
        return None
    return config


def _same(clip: Clip, spec: ClipSpec) -> bool:
    """Whether a CLIP is the one that `spec` names by its fingerprint."""
    if not spec.fingerprint:
        return True
    named, quick = _needs_quick_gelu(spec.name, spec.pretrained), _quick_gelu(clip.model)
    # Before QuickGELU was part of the fingerprint, only the name and the tag told of it.
    if named and quick and spec.fingerprint == _fingerprint(clip.model, activation=False):
        return True
    lost = named and not quick and not _needs_quick_gelu(clip.spec.name, clip.spec.pretrained)
    return spec.fingerprint == clip.spec.fingerprint and not lost


def _quick_gelu(model: nn.Module) -> bool:
    return any(isinstance(module, QuickGELU) for module in model.modules())


def _fingerprint(model: nn.Module, *, activation: bool = True) -> str:
    """SHA-256 of the weights, and of QuickGELU where the model has it: the same weights answer otherwise with GELU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    if activation and _quick_gelu(model):
        digest.update(b"quick_gelu")
    return digest.hexdigest()
