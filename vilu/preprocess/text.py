"""Strings to the token ids that CLIP's text tower reads. This file needs only ftfy, tokenizers and NumPy.

The export copies this file into the model repository, so the library and the server make the same token ids. This file
holds open_clip's cleaning (ftfy, then HTML entities), because a JSON file of the tokenizers library cannot. The JSON
file that vilu.export.tokenizer writes holds the rest: splitting, merges, first and last token, truncation and padding.
"""

from __future__ import annotations

import html
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass

import ftfy
import numpy as np
import tokenizers

CLEAN_MODES = ("lower", "whitespace", "canonicalize")
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


@dataclass(frozen=True)
class TextTransform:
    """The steps before and after the tokenizer's JSON file.

    clean: cleaning before the tokenizer: "lower" (CLIP), "whitespace", or "canonicalize" (SigLIP), which removes ASCII
        punctuation and lowers the case.
    normalize: whether the file's own normalizer runs after the cleaning. A SentencePiece or WordPiece tokenizer needs
        its normalizer; that of a CLIP file only approximates the cleaning.
    zero_id: token id that becomes 0 after the tokenizer, such as CLIPA's separator; -1 for none.
    """

    clean: str = "lower"
    normalize: bool = False
    zero_id: int = -1

    def __post_init__(self) -> None:
        if self.clean not in CLEAN_MODES:
            raise ValueError(f"unsupported transform {self}")


def clean(text: str, mode: str = "lower") -> str:
    """Clean a text as open_clip's mode of this name does. A lone surrogate becomes U+FFFD."""
    # In printable ASCII, ftfy and html.unescape change only HTML entities. Skipping both saves most of the time.
    if "&" in text or not (text.isascii() and text.isprintable()):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if mode == "canonicalize":
        text = text.translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if mode == "lower" else text


class Tokenizer:
    """A tokenizer from a JSON file that vilu.export.tokenizer wrote. Several threads may use one at once.

    Args:
        path: the JSON file.
        transform: the steps around it; None stands for CLIP's.

    Raises:
        ValueError: vilu.export.tokenizer did not write the file.
    """

    def __init__(self, path: str | os.PathLike[str], transform: TextTransform | None = None) -> None:
        self.transform = transform or TextTransform()
        self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        if not self.transform.normalize:
            self._tokenizer.normalizer = None
        truncation = self._tokenizer.truncation
        if truncation is None:
            raise ValueError(f"{path}: a tokenizer that vilu.export did not write (no context length)")
        self.context_length: int = truncation["max_length"]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the token ids (N, L) int64 of N strings, padded and truncated to the context length L."""
        cleaned = [clean(text, self.transform.clean) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(cleaned)
        ids = np.array([encoding.ids for encoding in encodings], np.int64).reshape(len(texts), self.context_length)
        if self.transform.zero_id >= 0:
            ids[ids == self.transform.zero_id] = 0
        return ids
