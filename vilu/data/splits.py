"""Names of splits: which folders, shards and table rows are training, validation and test data."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vilu.errors import UserError

SPLITS = ("train", "val", "test")
_SYNONYMS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {word: split for split, words in _SYNONYMS.items() for word in words}
# Words that may stand beside a split's name, as in "training_set", "seg_train" and "val2017".
_BESIDE = {"set", "data", "dataset", "split", "images", "image", "imgs", "img", "photos", "pictures", "seg"}
_GLUED = re.compile(rf"({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?:set|data|images)")
_WORDS = re.compile(r"[^\W\d_]+|\d+")
_YEAR = re.compile(r"(?:19|20)\d\d")


def split_named(name: str) -> str | None:
    """Return the split that a whole name stands for, or None. Upper and lower case are the same.

    >>> split_named("Validation"), split_named("training_set"), split_named("val2017"), split_named("test bench")
    ('val', 'train', 'val', None)
    """
    found = {None if word in _BESIDE or _YEAR.fullmatch(word) else _split_of(word) or word for word in _words(name)}
    found.discard(None)
    (only,) = found if len(found) == 1 else (None,)
    return only if only in SPLITS else None


def split_within(name: str) -> str | None:
    """Return the split that one word of a name stands for, as in "cc3m-validation-0001"; None for none or several.

    >>> split_within("cc3m-validation-0001"), split_within("shard-0001")
    ('val', None)
    """
    found = {split for word in _words(name) if (split := _split_of(word))}
    return found.pop() if len(found) == 1 else None


def check_split(split: str) -> str:
    """Return "train", "val" or "test" for a split's name or synonym. Raises UserError for any other name."""
    found = split_named(split)
    if found is None:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return found


def no_split(where: object, split: str, there: Iterable[str]) -> UserError:
    """Return the error for data that lacks a split."""
    return UserError(f"{where}: has no split {split!r}, only {', '.join(sorted(set(there)))}")


def _words(name: str) -> list[str]:
    return _WORDS.findall(name.lower())


def _split_of(word: str) -> str | None:
    glued = _GLUED.fullmatch(word)
    return _SPLIT_OF.get(glued[1] if glued else word)
