"""The record: one row for each answer of a server, the feedback about the answers, and where both are kept.

`table` has the rows, `parquet` and `postgres` keep them, `recorder` writes them from the door, `feedback` takes what
people say about them. The image is never recorded.
"""

from __future__ import annotations

from pathlib import Path

from vilu.errors import UserError
from vilu.serving.record.parquet import ParquetRecord
from vilu.serving.record.table import Feedback, Record

__all__ = ["Feedback", "ParquetRecord", "Record", "open_record"]


def open_record(where: str, *, create: bool = False) -> Record:
    """Open a record.

    Args:
        where: a folder, postgresql://..., or @FILE whose first line is one of these (a URL can hold a password).
        create: make the folder or the tables where they are missing.

    Raises:
        UserError: no such record, or it cannot be opened.
    """
    if where.startswith("@"):
        try:
            where = Path(where[1:]).read_text("utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{where[1:]}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not where:
        raise UserError("a record must be a folder or postgresql://..., not nothing")
    if where.startswith(("postgresql://", "postgres://")):
        from vilu.serving.record.postgres import PostgresRecord

        return PostgresRecord(where, create=create)
    return ParquetRecord(Path(where), create=create)
