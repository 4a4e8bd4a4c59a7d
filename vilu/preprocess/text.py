"""Strings to the token ids that CLIP's text tower reads; ftfy, tokenizers and NumPy only.

The same file runs in Python and in the server (export copies it beside the model that needs it). What a tokenizers
JSON cannot hold stays here: open_clip's cleaning (ftfy and HTML entities), in its order. The JSON that
vilu.export.tokenizer writes holds the rest: splitting, merges, first and last token, truncation, padding.
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
    """What happens to a string around the tokenizer's file.

    clean: "lower" (CLIP), "whitespace" or "canonicalize" (SigLIP: no ASCII punctuation, lower case).
    normalize: whether the file's own normalizer runs after that. A CLIP file's only stands in for the cleaning where
        there is none; a SentencePiece or WordPiece file's is part of the tokenizer.
    zero_id: an id that is answered as 0 (CLIPA's separator); -1: none.
    """

    clean: str = "lower"
    normalize: bool = False
    zero_id: int = -1

    def __post_init__(self) -> None:
        if self.clean not in CLEAN_MODES:
            raise ValueError(f"unsupported transform {self}")


def clean(text: str, mode: str = "lower") -> str:
    """The text as open_clip's `clean` modes leave it; a lone surrogate becomes U+FFFD."""
    # Of printable ASCII, ftfy and HTML change entities alone; both would cost more than all the rest.
    if "&" in text or not (text.isascii() and text.isprintable()):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if mode == "canonicalize":
        text = text.translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if mode == "lower" else text


class Tokenizer:
    """A file that vilu.export.tokenizer wrote, with its TextTransform. Threads may share one."""

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
        """(N, L) int64 ids of N strings, padded and truncated to the context length L."""
        cleaned = [clean(text, self.transform.clean) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(cleaned)
        ids = np.array([encoding.ids for encoding in encodings], np.int64).reshape(len(texts), self.context_length)
        if self.transform.zero_id >= 0:
            ids[ids == self.transform.zero_id] = 0
        return ids
