"""A folder written whole or not at all: beside its place under another name, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vilu.errors import UserError


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `output` once the block has ended well; else `output` is untouched.

    Raises:
        UserError: the folder cannot be written.
    """
    staging = _stage(output)
    try:
        yield staging
        _replace(staging, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage(output: Path) -> Path:
    """A folder beside the output, with the mode that any new folder would have."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)
    return staging


def _replace(staging: Path, output: Path) -> None:
    old = None
    if output.exists():
        old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.old."))
        os.rename(output, old / "repository")
    try:
        os.rename(staging, output)
    except OSError:
        if old is not None:
            os.rename(old / "repository", output)
        raise
    finally:
        if old is not None and output.exists():
            shutil.rmtree(old, ignore_errors=True)
