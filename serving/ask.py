"""`vilu ask`: images from files, folders, patterns or standard input; answers as a table or in a file."""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vilu.cli.progress import progress_bar
from vilu.data.image_files import SUFFIXES
from vilu.errors import UserError
from vilu.serving.access import connection_options, token_from
from vilu.serving.client import Answer, Client

FORMATS = (".jsonl", ".csv", ".parquet")
FIELDS = ("source", "label", "class_index", "confidence", "failure_probability", "accept", "error")
DETAILS = ("class_set", "top", "entropy", "doctor", "concepts")  # only where they were asked for
ROWS = 1024  # answers held at once for a Parquet file


@click.command("ask")
@click.argument("images", nargs=-1, required=True)
@connection_options
@click.option("--model", default="vilu", show_default=True)
@click.option("--label", "labels", multiple=True, help="A candidate of your own, instead of the class set; repeat.")
@click.option("--class-set", metavar="NAME", help="A class set that the server has (`vilu classes list`).")
@click.option("--details", is_flag=True, help="Also the likeliest labels, what the doubt is between, and other scores.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Seconds."
)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images in a request.")
@click.option("--in-flight", type=click.IntRange(1), default=4, show_default=True, help="Requests at once.")
@click.option("--output", type=click.Path(path_type=Path), help="File to write: .jsonl, .csv or .parquet.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, one object an image.")
def ask_command(
    images: tuple[str, ...],
    url: str,
    token: str | None,
    model: str,
    labels: tuple[str, ...],
    class_set: str | None,
    details: bool,
    timeout: float,
    batch_size: int,
    in_flight: int,
    output: Path | None,
    as_json: bool,
    **tls: str | None,
) -> int:
    """Ask a running server what is in each image, and whether to believe it.

    IMAGES are files, folders (all images below), patterns ("photos/*.jpg", ** for any depth), or - to read names
    from standard input, one a line. Exit code 0 when every image was answered, 2 when one was not.
    """
    if output is not None and as_json:
        raise UserError("--json prints: give either it or --output")
    if labels and class_set is not None:
        raise UserError("--label and --class-set: give one or the other")
    columns = (*FIELDS, *(DETAILS if details else ("class_set",) if class_set is not None else ()))
    names = list(find_images(images))
    bad = 0
    with (
        Client(
            url,
            model=model,
            timeout=timeout,
            batch_size=batch_size,
            in_flight=in_flight,
            token=token_from(token, "VILU_TOKEN"),
            **tls,
        ) as client,
        progress_bar() as bar,
        _Sink.open(output, columns) as sink,
    ):
        answers = client.stream(names, labels or None, class_set=class_set, details=details)
        for done, answer in enumerate(answers, 1):
            sink.add(answer)
            if answer.error is not None:
                bad += 1
                click.echo(f"{answer.source}: {answer.error}", err=True)
            bar("asking", done, len(names))
    if isinstance(sink, _Memory):
        if as_json:
            click.echo(json.dumps([row(answer, columns) for answer in sink.answers], indent=2))
        elif len(sink.answers) > bad:
            print_answers([answer for answer in sink.answers if answer.error is None])
    else:
        click.echo(f"{output}: {len(names)} images, {bad} without an answer")
    return 2 if bad else 0


def find_images(given: Iterable[str]) -> Iterator[str]:
    """File names of what the user named. Raises UserError where a folder or a pattern has no image."""
    for name in given:
        if name == "-":
            yield from (line for line in sys.stdin.read().splitlines() if line)
        elif os.path.isdir(name):
            yield from _some(name, (str(p) for p in sorted(Path(name).rglob("*")) if p.suffix.lower() in SUFFIXES))
        elif not os.path.exists(name) and glob.has_magic(name):
            yield from _some(name, sorted(glob.glob(name, recursive=True)))
        else:
            yield name


def _some(name: str, found: Iterable[str]) -> list[str]:
    files = [path for path in found if os.path.isfile(path)]
    if not files:
        raise UserError(f"{name}: no {', '.join(SUFFIXES)} files there")
    return files


def row(answer: Answer, columns: Sequence[str] = FIELDS) -> dict[str, Any]:
    """An answer for a program: without an error, or nothing but it."""
    if answer.error is not None:
        return {"source": answer.source, "error": answer.error}
    return {name: getattr(answer, name) for name in columns}


class _Sink:
    """Where answers go, one by one; columns: the fields of an Answer that are written."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns

    def add(self, answer: Answer) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Finish; called once."""

    @staticmethod
    @contextlib.contextmanager
    def open(path: Path | None, columns: Sequence[str]) -> Iterator[_Sink]:
        """A sink for a file, whole or not there: what an interrupted run had is kept beside it, and told.

        Raises:
            UserError: an unknown kind of file, or one that cannot be written.
        """
        if path is None:
            yield _Memory(columns)
            return
        if path.suffix.lower() not in FORMATS:
            raise UserError(f"{path}: the name must end in {', '.join(FORMATS)}")
        part = path.with_name(f"{path.stem}.part{path.suffix}")
        try:
            sink = {".jsonl": _Lines, ".csv": _Csv, ".parquet": _Parquet}[path.suffix.lower()](columns, part)
            try:
                yield sink
            except UserError as error:
                sink.close()
                raise UserError(f"{error}; the answers until then are in {part}") from None
            sink.close()
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


class _Memory(_Sink):
    def __init__(self, columns: Sequence[str]) -> None:
        super().__init__(columns)
        self.answers: list[Answer] = []

    def add(self, answer: Answer) -> None:
        self.answers.append(answer)


class _Lines(_Sink):
    def __init__(self, columns: Sequence[str], path: Path) -> None:
        super().__init__(columns)
        self.file = path.open("w", encoding="utf-8", errors="surrogateescape")

    def add(self, answer: Answer) -> None:
        self.file.write(json.dumps(row(answer, self.columns)) + "\n")

    def close(self) -> None:
        self.file.close()


class _Csv(_Sink):
    def __init__(self, columns: Sequence[str], path: Path) -> None:
        super().__init__(columns)
        self.file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self.table = csv.DictWriter(self.file, columns)
        self.table.writeheader()

    def add(self, answer: Answer) -> None:
        cells = row(answer, self.columns).items()
        self.table.writerow({k: json.dumps(value) if isinstance(value, tuple) else value for k, value in cells})

    def close(self) -> None:
        self.file.close()


class _Parquet(_Sink):
    def __init__(self, columns: Sequence[str], path: Path) -> None:
        super().__init__(columns)
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise UserError("Parquet needs a package: pip install 'vilu[parquet]'") from None
        kinds = {"class_index": pa.int32(), "accept": pa.bool_()}
        kinds |= dict.fromkeys(("confidence", "failure_probability", "entropy", "doctor"), pa.float32())
        pairs = pa.list_(pa.struct([("label", pa.string()), ("weight", pa.float32())]))
        kinds |= dict.fromkeys(("top", "concepts"), pairs)
        self.pa = pa
        self.schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
        self.file = pq.ParquetWriter(path, self.schema)
        self.rows: list[dict[str, Any]] = []

    def add(self, answer: Answer) -> None:
        cells = row(answer, self.columns)
        for name in {"top", "concepts"} & cells.keys():
            cells[name] = [{"label": label, "weight": weight} for label, weight in cells[name]]
        self.rows.append(cells)
        if len(self.rows) == ROWS:
            self._write()

    def _write(self) -> None:
        # A file's name may hold bytes that are no UTF-8; a missing field is null.
        rows = [{**r, "source": r["source"].encode("utf-8", "replace").decode()} for r in self.rows]
        self.file.write_table(self.pa.Table.from_pylist(rows, self.schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._write()
        self.file.close()


def print_answers(answers: Sequence[Answer]) -> None:
    """The table of `vilu ask`."""
    table = Table(Column("file", overflow="fold"), "label", "confidence", "P(failure)", "")
    detailed = any(a.concepts for a in answers)
    if detailed:
        table.add_column("doubt between", min_width=13)
    for a in answers:
        verdict = "[green]accept[/]" if a.accept else "[red]reject[/]"
        doubt = [escape(", ".join(f"{label} {weight:.0%}" for label, weight in a.concepts[:3]))] if detailed else []
        cells = (escape(a.source), escape(a.label), f"{a.confidence:.3f}", f"{a.failure_probability:.3f}", verdict)
        table.add_row(*cells, *doubt)
    Console(file=sys.stdout).print(table)
