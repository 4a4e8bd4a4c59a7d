"""Class sets: the names that an image can be given, the prompts they are read through, their embeddings.

Importing this needs no torch: clients and servers read class names by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.errors import UserError
from vilu.preprocess.class_names import names_problem, prompts, templates_problem

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_TEMPLATES", "ClassSet", "check_names", "check_templates", "prompts", "read_names"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class ClassSet:
    """The candidates of a closed set. `len` is the number of classes K.

    names: K distinct class names.
    templates: prompts with one `{}` each, in which a name is put.
    text_embeddings: (K, D) float32, row k the unit vector of class k: the mean over its prompts, normalised.

    Raises:
        UserError: no names, an empty or repeated name, a template without exactly one `{}`,
            or embeddings that are not one finite unit row a name.

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
    """Raise UserError unless there are names and all are non-empty, distinct strings of UTF-8.

    where: what the message names first: a file, a data set.
    """
    if problem := names_problem(names):
        raise UserError(f"{where}: {problem}")


def check_templates(templates: Sequence[str], where: str = "class set") -> None:
    """Raise UserError unless there is a template and each holds exactly one `{}`."""
    if problem := templates_problem(templates):
        raise UserError(f"{where}: {problem}")


def read_names(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line (UTF-8); blank lines at its end do not count.

    Raises:
        UserError: a file that cannot be read, or as `check_names` does.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    check_names(names, str(path))
    return tuple(names)
