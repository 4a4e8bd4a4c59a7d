"""The graphs of the embedded CLIP, for the test that writes them in two processes."""

from pathlib import Path

import torch

from vilu import load_clip
from vilu.export.graphs import ImageGraph, TextGraph, example_tokens, write_graph


def write_tiny(root: Path) -> tuple[bytes, bytes]:
    """The embedded CLIP's image and text graph, written under `root`, as bytes."""
    clip = load_clip()
    feed = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    image, text = (root / name / "1" / "model.onnx" for name in ("clip_image", "clip_text"))
    write_graph(ImageGraph(clip), feed, image, "PIXELS", {"IMAGE_EMBEDDING": [128]}, fused=True)
    write_graph(TextGraph(clip), example_tokens(clip), text, "TOKENS", {"TEXT_EMBEDDING": [128]}, fused=True)
    return image.read_bytes(), text.read_bytes()
