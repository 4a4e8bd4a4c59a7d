"""A record in PostgreSQL, for several servers: the tables vilu_answers, vilu_feedback and others.

A server writes its rows in transactions of their own, one after the other, each with the server's name and a number.
vilu_writers has the last number of each, so that a reader who knows how far it came finds what came since.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa

from vilu.errors import UserError
from vilu.serving.record.table import SCHEMA, Feedback

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
ALTER TABLE vilu_answers ADD COLUMN IF NOT EXISTS writer text NOT NULL DEFAULT '';
ALTER TABLE vilu_answers ADD COLUMN IF NOT EXISTS part integer NOT NULL DEFAULT 0;
ALTER TABLE vilu_answers ADD COLUMN IF NOT EXISTS stage integer;
ALTER TABLE vilu_answers ADD COLUMN IF NOT EXISTS escalation_failed boolean;
CREATE TABLE IF NOT EXISTS vilu_writers (writer text PRIMARY KEY, part integer NOT NULL);
INSERT INTO vilu_writers VALUES ('', 0) ON CONFLICT DO NOTHING;
CREATE INDEX IF NOT EXISTS vilu_answers_part ON vilu_answers (writer, part);
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
        self.writer, self.written = secrets.token_hex(8), 0
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

    def append(self, rows: pa.Table) -> None:
        names = ", ".join(SCHEMA.names)
        columns = [rows[name].to_pylist() for name in SCHEMA.names[:-1]]
        columns.append(_vectors(rows[SCHEMA.names[-1]]))
        with self._connected() as connection, connection.cursor() as cursor:
            found = cursor.execute("SELECT part FROM vilu_writers WHERE writer = %s", (self.writer,)).fetchone()
            if found == (self.written,):  # it was committed, though the connection broke before the answer came
                self.written += 1
                return
            with cursor.copy(f"COPY vilu_answers ({names}, writer, part) FROM STDIN") as copy:
                for row in zip(*columns, strict=True):
                    copy.write_row((*row, self.writer, self.written))
            cursor.execute(
                "INSERT INTO vilu_writers VALUES (%s, %s) ON CONFLICT (writer) DO UPDATE SET part = EXCLUDED.part",
                (self.writer, self.written),
            )
        self.written += 1

    def tidy(self, keep_days: float | None) -> None:
        if keep_days is None:
            return
        oldest = datetime.now(timezone.utc) - timedelta(days=keep_days)
        with self._connected() as connection:
            connection.execute("DELETE FROM vilu_answers WHERE time < %s", (oldest,))
            connection.execute("DELETE FROM vilu_feedback WHERE time < %s", (oldest,))

    def batches(self, columns: Sequence[str] = SCHEMA.names, done: dict[str, int] | None = None) -> Iterator[pa.Table]:
        done = {} if done is None else done
        with self._connected() as connection:
            # A writer's writes are visible in their order, so what is read here is all up to these.
            last = dict(connection.execute("SELECT writer, part FROM vilu_writers").fetchall())
            new = [name for name, part in last.items() if part > done.get(name, -1)]
            bounds = new, [done.get(name, -1) for name in new], [last[name] for name in new]
            yield from self._rows(
                connection,
                columns,
                "vilu_answers AS a JOIN unnest(%s::text[], %s::integer[], %s::integer[]) AS w (writer, after, upto) "
                "ON a.writer = w.writer AND a.part > w.after AND a.part <= w.upto",
                bounds,
            )
        done.update(last)

    def find(self, ids: Iterable[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        with self._connected() as connection:
            yield from self._rows(connection, columns, "vilu_answers AS a WHERE id = ANY(%s)", (list(ids),))

    def _rows(
        self, connection: psycopg.Connection[Any], columns: Sequence[str], where: str, given: Sequence[Any]
    ) -> Iterator[pa.Table]:
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        # An older version of vilu made the table without the last columns, and only a server adds them.
        probe = connection.execute("SELECT * FROM vilu_answers LIMIT 0").description or ()
        there = {column.name for column in probe}
        # The names are those of SCHEMA: nothing that a user wrote.
        names = ", ".join(f"a.{name}" if name in there else f"NULL AS {name}" for name in schema.names)
        with connection.cursor("vilu_rows") as cursor:
            cursor.itersize = ROWS
            cursor.execute(f"SELECT {names} FROM {where} ORDER BY a.time", given)
            while rows := cursor.fetchmany(ROWS):
                made = [dict(zip(schema.names, row, strict=True)) for row in rows]
                for row in made:
                    if row.get("embedding") is not None:
                        row["embedding"] = np.frombuffer(row["embedding"], np.float16)
                yield pa.Table.from_pylist(made, schema)

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


def _vectors(column: pa.ChunkedArray) -> list[bytes | None]:
    """The bytes of each row of a column of float16 lists."""
    lists = column.combine_chunks()
    flat, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
    there = lists.is_valid().to_pylist()
    return [
        flat[first:last].tobytes() if valid else None for first, last, valid in zip(ends, ends[1:], there, strict=False)
    ]
