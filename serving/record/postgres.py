"""A record in PostgreSQL, for several servers: the tables vilu_answers and vilu_feedback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa

from vilu.errors import UserError
from vilu.serving.record.table import SCHEMA, Feedback, Row

try:
    import psycopg
except ModuleNotFoundError:
    raise UserError("postgresql:// needs a package: pip install 'vilu[postgres]'") from None

ROWS = 8192  # in one batch
CONNECT_SECONDS = 5
LOCK = 0x76696C75  # so that two servers that start at once do not both make the tables
TABLES = """
CREATE TABLE IF NOT EXISTS vilu_answers (
    id text NOT NULL, time timestamptz NOT NULL, model text NOT NULL, model_version integer NOT NULL,
    checkpoint text NOT NULL, class_set text NOT NULL, class_set_version integer NOT NULL,
    class_index integer NOT NULL, label text NOT NULL, confidence real NOT NULL, failure_probability real NOT NULL,
    accept boolean NOT NULL, entropy real, label_probability real NOT NULL, chosen boolean NOT NULL, embedding bytea);
CREATE INDEX IF NOT EXISTS vilu_answers_time ON vilu_answers (time);
CREATE INDEX IF NOT EXISTS vilu_answers_id ON vilu_answers (id);
CREATE TABLE IF NOT EXISTS vilu_feedback (
    number bigserial PRIMARY KEY, id text NOT NULL, "right" boolean, label text, time timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS vilu_references (checkpoint text PRIMARY KEY, reference text NOT NULL);
"""


class PostgresRecord:
    """See `Record`. A lost connection is made anew at the next call.

    Raises:
        UserError: the database cannot be reached, or has no record where `create` does not make one.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.url = url
        self.connection: psycopg.Connection[Any] | None = None
        with self._connected() as connection:
            if create:
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
                connection.execute(TABLES)
            elif connection.execute("SELECT to_regclass('vilu_answers')").fetchone() == (None,):
                raise UserError("postgresql: the database has no record; `vilu serve --record URL` makes one")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[Any]]:
        """A transaction. Raises UserError, without the URL, which can hold a password."""
        try:
            if self.connection is None or self.connection.closed:
                self.connection = psycopg.connect(self.url, connect_timeout=CONNECT_SECONDS)
            with self.connection.transaction():
                yield self.connection
        except psycopg.Error as error:
            if self.connection is not None and self.connection.broken:
                self.connection.close()
            line = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"postgresql: {line[:300]}") from None

    def append(self, rows: Sequence[Row]) -> None:
        names = ", ".join(SCHEMA.names)
        with (
            self._connected() as connection,
            connection.cursor() as cursor,
            cursor.copy(f"COPY vilu_answers ({names}) FROM STDIN") as copy,
        ):
            for row in rows:
                values = [row.get(name) for name in SCHEMA.names]
                if values[-1] is not None:
                    values[-1] = np.asarray(values[-1], np.float16).tobytes()
                copy.write_row(values)

    def tidy(self, keep_days: float | None) -> None:
        if keep_days is None:
            return
        oldest = datetime.now(timezone.utc) - timedelta(days=keep_days)
        with self._connected() as connection:
            connection.execute("DELETE FROM vilu_answers WHERE time < %s", (oldest,))
            connection.execute("DELETE FROM vilu_feedback WHERE time < %s", (oldest,))

    def batches(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        names = ", ".join(schema.names)  # of SCHEMA: nothing that a user wrote
        with self._connected() as connection, connection.cursor("vilu_rows") as cursor:
            cursor.itersize = ROWS
            cursor.execute(f"SELECT {names} FROM vilu_answers ORDER BY time")
            while rows := cursor.fetchmany(ROWS):
                made = [dict(zip(schema.names, row, strict=True)) for row in rows]
                for row in made:
                    if row.get("embedding") is not None:
                        row["embedding"] = np.frombuffer(row["embedding"], np.float16)
                yield pa.Table.from_pylist(made, schema)

    def known(self, ids: Iterable[str]) -> set[str]:
        with self._connected() as connection:
            found = connection.execute("SELECT DISTINCT id FROM vilu_answers WHERE id = ANY(%s)", (list(ids),))
            return {row[0] for row in found}

    def put_reference(self, checkpoint: str, reference: str) -> None:
        with self._connected() as connection:
            connection.execute(
                "INSERT INTO vilu_references VALUES (%s, %s) ON CONFLICT (checkpoint) DO UPDATE SET reference = %s",
                (checkpoint, reference, reference),
            )

    def reference(self, checkpoint: str) -> str | None:
        with self._connected() as connection:
            found = connection.execute("SELECT reference FROM vilu_references WHERE checkpoint = %s", (checkpoint,))
            row = found.fetchone()
            return row[0] if row else None

    def give(self, feedback: Sequence[Feedback]) -> None:
        rows = [(one.id, one.right, one.label, one.time) for one in feedback]
        with self._connected() as connection, connection.cursor() as cursor:
            cursor.executemany('INSERT INTO vilu_feedback (id, "right", label, time) VALUES (%s, %s, %s, %s)', rows)

    def feedback(self) -> Iterator[Feedback]:
        with self._connected() as connection, connection.cursor("vilu_said") as cursor:
            cursor.itersize = ROWS
            cursor.execute('SELECT id, "right", label, time FROM vilu_feedback ORDER BY number')
            for row in cursor:
                yield Feedback(*row)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
