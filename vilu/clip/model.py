"""`Clip`: an open_clip model with the preprocessing of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu.checkpoint import ClipSpec
from vilu.class_set import DEFAULT_TEMPLATES, ClassSet, check_names, check_rows, prompts
from vilu.errors import UserError
from vilu.preprocess.image import RESIZE_MODES, Transform


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
        transform: function that turns image bytes, or a Pillow image, into (S, S, 3) uint8 pixels.
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
        device = self.mean.device
        return torch.cat([self.encode_pixels(torch.from_numpy(np.array(batch)).to(device)) for batch in batches])

    @torch.no_grad()
    def class_set(self, names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> ClassSet:
        """Make a class set. Each row is the normalised mean of a class's normalised prompt embeddings.

        Args:
            names: K class names.
            templates: prompts with exactly one `{}` each.

        Raises:
            UserError: the names or the templates break a rule of `ClassSet`, or two names have the same embedding.
        """
        check_names(names)
        texts = prompts(names, templates)
        tokens = [self.tokenize(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        rows = [self.encode_tokens(some.to(self.mean.device)) for some in tokens]
        grouped = torch.cat(rows).view(len(names), len(templates), -1)
        embeddings = F.normalize(grouped.mean(dim=1), dim=-1)
        check_rows(names, embeddings)
        return ClassSet(tuple(names), tuple(templates), embeddings)


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
