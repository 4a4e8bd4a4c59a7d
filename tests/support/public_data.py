"""The files of tests/data, whose README.md says where they come from."""

from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"


def lvis_text_embeddings() -> np.ndarray:
    """(1203, 512) float16 text embeddings of the LVIS class names by CLIP ViT-B/32, not normalised."""
    return np.load(DATA / "lvis_v1_vit_b32.npy")
