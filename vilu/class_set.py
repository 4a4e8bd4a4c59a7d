"""Class sets: the class names that CLIP chooses from, their prompt templates and their text embeddings.

This module imports no torch, so clients and servers can use its rules for class names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.errors import UserError
from vilu.preprocess.class_names import names_problem, prompts, rows_problem, templates_problem

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_TEMPLATES", "ClassSet", "check_names", "check_rows", "check_templates", "prompts", "read_names"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class ClassSet:
    """The K classes that CLIP chooses from. `len` gives K.

    names: K distinct class names.
    templates: prompts with exactly one `{}` each, which the class name replaces.
    text_embeddings: (K, D) float32; row k is the normalised mean of the prompt embeddings of class k. Rows that a user
        brings may be equal, as data sets hold names that CLIP cannot tell apart; the first of them is answered.

    Raises:
        UserError: there are fewer than two names, a name is empty, two names are the same to the tokenizer, a template
            does not hold exactly one `{}`, or text_embeddings does not have one finite row of norm 1 for each name.

    Examples:
        >>> import torch
        >>> classes = ClassSet(("cat", "dog"), ("a photo of a {}.",), torch.eye(2))
        >>> len(classes)
        2
        >>> ClassSet(("cat", "cat"), ("a photo of a {}.",), torch.eye(2))
        Traceback (most recent call last):
        ...
        vilu.errors.UserError: class set: class name 2 ('cat') repeats class name 1
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    text_embeddings: Tensor

    def __post_init__(self) -> None:
        check_names(self.names)
        check_templates(self.templates)
        t = self.text_embeddings
        if t.ndim != 2 or len(t) != len(self.names):
            raise UserError(f"class set: {len(self.names)} names but text_embeddings of shape {tuple(t.shape)}")
        if not t.isfinite().all():
            raise UserError("class set: text_embeddings hold a value that is not finite")
        norms = t.double().norm(dim=1)
        if (norms - 1).abs().max() > 1e-3:
            worst = int((norms - 1).abs().argmax())
            raise UserError(
                f"class set: text embedding of {self.names[worst]!r} has norm {norms[worst]:.4f}, expected 1"
            )

    def __len__(self) -> int:
        return len(self.names)


def check_names(names: Sequence[str], where: str = "class set") -> None:
    """Check class names.

    Args:
        names: the class names.
        where: what the message names first, such as a file or a data set.

    Raises:
        UserError: there are fewer than two names, a name is empty or not UTF-8, or two names are the same to CLIP's
            tokenizer.
    """
    if problem := names_problem(names):
        raise UserError(f"{where}: {problem}")


def check_rows(names: Sequence[str], text_embeddings: Tensor, where: str = "class set") -> None:
    """Check that no two names got the same text embedding, as names that differ only at a cut-off end do.

    Args:
        names: K class names.
        text_embeddings: (K, D), rows of norm 1.
        where: what the message names first, such as a file or a data set.

    Raises:
        UserError: two rows are the same.
    """
    if problem := rows_problem(names, text_embeddings.detach().cpu().float().numpy()):
        raise UserError(f"{where}: {problem}")


def check_templates(templates: Sequence[str], where: str = "class set") -> None:
    """Check prompt templates.

    Args:
        templates: the prompts.
        where: what the message names first, such as a file or a data set.

    Raises:
        UserError: there is no template, or one does not hold exactly one `{}`.
    """
    if problem := templates_problem(templates):
        raise UserError(f"{where}: {problem}")


def read_names(path: Path) -> tuple[str, ...]:
    """Read class names from a UTF-8 text file with one name per line.

    Blank lines at the end and a byte order mark do not count.

    Raises:
        UserError: the file cannot be read, or `check_names` refuses its names.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    check_names(names, str(path))
    return tuple(names)
