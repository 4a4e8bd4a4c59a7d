"""`score` gives the answers of a whole data set as a Ray Dataset; `run_job` writes them, and goes on after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vilu
from vilu.errors import UserError
from vilu.serving.offline import files
from vilu.serving.offline.blocks import BLOCK_ROWS, KEPT
from vilu.serving.offline.cluster import cluster, quiet, reason
from vilu.serving.offline.inputs import Input, open_input
from vilu.serving.offline.scorer import Scorer
from vilu.serving.offline.summary import Counts, check_bad, count, draw, summarise

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

DATA, CHECKPOINT, JOB, SUMMARY, PICTURE = "data", "checkpoint", "job.json", "summary.json", "summary.png"
FORMAT = 1  # of job.json
ID = "row_id"
PENDING = ".pending.parquet"  # ending of a file in the checkpoint that is not committed
# Ray reserves a GiB for each actor that filters finished rows, which hold 8 bytes a row. It takes more where that is
# not enough.
FILTER_BYTES = 64 << 20
# Reading and writing wait for disks, not for cores: the cores are the actors'. Each is a process, so not too many.
LIGHT = 0.25


@dataclass(frozen=True)
class Answers:
    """What is asked of each image: see `Scorer`."""

    class_set: str | None = None
    labels: Sequence[str] | None = None
    details: bool = False
    embeddings: bool = False
    outlier_score: bool = False
    cascade: bool = True


@dataclass(frozen=True)
class Workers:
    """The actors that answer.

    Attributes:
        least, most: how many there are; Ray adds and removes some between these. None: one, and as many as the cores
            (or GPUs) allow.
        cpus: cores of each, so threads of its image tower.
        gpus: GPUs of each; a fraction puts several on one GPU, so that one decodes while another computes.
        batch_size: images in one run of the towers; None is the repository's largest.
    """

    least: int | None = None
    most: int | None = None
    cpus: int = 1
    gpus: float = 0
    batch_size: int | None = None


def score(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    repository: str | os.PathLike[str],
    *,
    class_set: str | None = None,
    labels: Sequence[str] | None = None,
    details: bool = False,
    embeddings: bool = False,
    outlier_score: bool = False,
    cascade: bool = True,
    column: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
    workers: Workers | None = None,
) -> Dataset:
    """Answer for every image of a data set, lazily, with the repository's own files and no server.

    Ray must be connected, or it starts as `ray.init()` starts it. Nothing is read or computed before the Dataset is
    consumed.

    Args:
        names: folders, patterns, images, lists, WebDataset shards, Parquet or CSV files (see `open_input`).
        repository: the model repository; every node needs it at this path.
        class_set, labels, details, embeddings, outlier_score, cascade: see `Scorer`.
        column, columns, limit: see `open_input`.
        workers: how many actors answer, and with what.

    Returns:
        One row an input row: row_id, source, the columns carried along, and those of `Scorer.schema`.

    Raises:
        UserError: the input or the repository cannot be used.
    """
    given = [names] if isinstance(names, str | os.PathLike) else list(names)
    source = open_input([os.fspath(one) for one in given], column=column, columns=columns, limit=limit)
    asked = Answers(class_set, labels, details, embeddings, outlier_score, cascade)
    scorer = Scorer(repository, **vars(asked))
    _check_columns(source, scorer)
    return dataset_of(source, scorer, asked, workers or Workers())


def _check_columns(source: Input, scorer: Scorer) -> None:
    clash = {ID, "source", KEPT, *scorer.schema.names} & set(source.columns)
    if clash:
        raise UserError(f"the input's columns {', '.join(sorted(clash))} have the names of output columns")


def dataset_of(
    source: Input, scorer: Scorer, asked: Answers, workers: Workers, tally: Any = None, mark: bool = False
) -> Dataset:
    """Return the answers for an Input, lazily.

    Args:
        source: what is read.
        scorer: the repository as it is here; the actors refuse another one.
        asked, workers: see `Answers` and `Workers`.
        tally: an actor whose `add` takes each batch's rows and bad images, and may raise to end the job; None: none.
        mark: whether to add the column KEPT.
    """
    import ray
    from ray.data import ActorPoolStrategy

    from vilu.serving.offline.datasource import Answerer, Rows

    arguments = {"repository": scorer.root, **vars(asked), "threads": workers.cpus, "expected": scorer.identity}
    resources: dict[str, Any] = {"num_cpus": workers.cpus}
    if workers.gpus:
        resources["num_gpus"] = workers.gpus
    dataset = ray.data.read_datasource(Rows(source), num_cpus=LIGHT, override_num_blocks=max(len(source.tasks()), 1))
    size = workers.batch_size or scorer.group_size
    # Ray makes blocks of many megabytes, which hold a million paths. A block is what a task answers, and what a lost
    # node costs.
    dataset = dataset.repartition(target_num_rows_per_block=max(BLOCK_ROWS // size, 1) * size)
    return dataset.map_batches(
        Answerer,
        fn_constructor_args=(arguments, tally, mark),
        batch_format="pyarrow",
        batch_size=size,
        compute=ActorPoolStrategy(min_size=workers.least or 1, max_size=workers.most or workers.least),
        zero_copy_batch=True,
        **resources,
    )


def run_job(
    names: Sequence[str],
    repository: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    asked: Answers | None = None,
    column: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
    accept_only: bool = False,
    max_bad: float = 0.1,
    rows_per_file: int = 20_000,
    workers: Workers | None = None,
    address: str | None = None,
    ray_options: dict[str, Any] | None = None,
    progress: bool = False,
    check: Callable[[Input], None] | None = None,
) -> dict[str, Any]:
    """Write the answers for a data set to a folder: a Parquet data set in `data`, and a summary.

    A job that was killed goes on with the same arguments. What an earlier run wrote and committed stays; a file that
    it had not committed is removed and its rows are answered again.

    Args:
        names, column, columns, limit: see `open_input`.
        repository: the model repository.
        output: folder or URI; every node writes to it.
        asked: see `Answers`.
        accept_only: keep only the rows of accepted answers. The summary still counts all.
        max_bad: share of bad images (0 to 1) at which the job stops.
        rows_per_file: rows of a file of the output, which is also what a kill can lose for each file being written.
        workers: see `Workers`.
        address: the Ray cluster to join; see `cluster`.
        ray_options: for a Ray that starts here; see `cluster`.
        progress: whether Ray draws its progress bars.
        check: receives the input before anything is written, and may refuse it.

    Returns:
        The summary, which `summary.json` holds too.

    Raises:
        UserError: the input, the repository or the output cannot be used; the output belongs to another job, or one
            runs on it now; there are too many bad images; or rows are missing in the end.
    """
    asked, workers = asked or Answers(), workers or Workers()
    scorer = Scorer(repository, **vars(asked))
    given = [os.fspath(name) for name in names]
    source = open_input(given, column=column, columns=columns, limit=limit, without=os.fspath(output))
    _check_columns(source, scorer)
    if check is not None:
        check(source)
    system, root = files.output_folder(output)
    with _alone(system, root, output):
        job = {
            "format": FORMAT,
            **scorer.metadata,
            "input": {"key": source.key(), "kind": source.kind, "files": len(source.units), "rows": source.rows},
            "details": asked.details,
            "embeddings": asked.embeddings,
            **({"outlier_score": True} if asked.outlier_score else {}),
            "columns": list(columns),
            "accept_only": accept_only,
        }
        _claim(system, root, str(output), job)
        finished = files.read(system, f"{root}/{SUMMARY}")
        if finished is not None:
            _clear(system, root, accept_only)
            summary: dict[str, Any] = json.loads(finished)
            return summary
        schema = _schema(source, scorer, job)
        before = count(system, f"{root}/{DATA}", without=_settle(system, root))
        started = time.time()
        ray_options = dict(ray_options or {})
        if address is None:
            # One more than there are: the filter of finished rows counts as one, beside actors on all cores.
            cores = ray_options.get("cpus") or len(os.sched_getaffinity(0))
            ray_options["cpus"] = max(cores, workers.cpus) + 1
            if workers.most is None and not workers.gpus:
                workers = replace(workers, most=max(cores // workers.cpus, workers.least or 1))
        with quiet(not progress), cluster(address, progress=progress, **ray_options) as ray:
            try:
                _write(ray, source, scorer, asked, workers, before, job, schema, system, root, max_bad, rows_per_file)
            except KeyboardInterrupt:
                raise
            except Exception as error:  # Ray wraps what ended the job in errors of its own
                if found := reason(error):
                    raise UserError(f"{found}; run the same command again to go on") from None
                raise
        after = count(system, f"{root}/{DATA}", source.kind == "images", pictured=True)
        after.check(source.rows, str(output))
        if not after.rows:
            raise UserError(f"{names[0]}: holds no images")
        check_bad(after.bad, after.rows, max_bad)  # the actors look before their next batch, so not after their last
        if accept_only and not after.accepted:
            _write_none(system, root, schema)
        summary = summarise(after, before, time.time() - started, job)
        files.write(system, f"{root}/{PICTURE}", draw(summary, after))
        files.write(system, f"{root}/{SUMMARY}", json.dumps(summary, indent=2).encode())
        _clear(system, root, accept_only)
        return summary


def _write(
    ray: Any,
    source: Input,
    scorer: Scorer,
    asked: Answers,
    workers: Workers,
    before: Counts,
    job: dict[str, Any],
    schema: pa.Schema,
    system: Any,
    root: str,
    max_bad: float,
    rows_per_file: int,
) -> None:
    from ray.data.checkpoint import CheckpointConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from vilu.serving.offline.datasource import Finished, Tally

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    placed = Tally.options(scheduling_strategy=here)  # type: ignore[attr-defined]
    tally = placed.remote(source.rows, max_bad, before.rows, before.bad)
    mark = bool(job["accept_only"])
    dataset = dataset_of(source, scorer, asked, workers, tally, mark)
    config = CheckpointConfig(
        ID,
        f"{root}/{CHECKPOINT}",
        delete_checkpoint_on_success=False,
        override_filesystem=system,
        checkpoint_manager_cls=Finished,
    )
    config.checkpoint_actor_memory_bytes = FILTER_BYTES
    dataset.context.checkpoint_config = config
    dataset.write_parquet(
        f"{root}/{DATA}",
        filesystem=system,
        partition_cols=[KEPT] if mark else None,
        min_rows_per_file=rows_per_file,
        ray_remote_args={"num_cpus": LIGHT},
        compression="zstd",
        schema=schema,
    )


def _schema(source: Input, scorer: Scorer, job: dict[str, Any]) -> pa.Schema:
    """Return the schema of the output, with the job in its metadata."""
    import pyarrow as pa

    fields = [pa.field(ID, pa.int64()), pa.field("source", pa.string())]
    fields += [pa.field(name, kind) for name, kind in source.columns.items()] + list(scorer.schema)
    fields += [pa.field(KEPT, pa.string())] if job["accept_only"] else []
    metadata = {"vilu": json.dumps(job), "vilu.version": vilu.__version__}
    return pa.schema(fields, metadata)


@contextlib.contextmanager
def _alone(system: Any, root: str, output: Any) -> Iterator[None]:
    """Hold the output folder: two jobs at once would write each row twice. Only a local folder has a lock."""
    from pyarrow import fs

    if not isinstance(system, fs.LocalFileSystem):
        yield
        return
    with open(Path(root) / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{output}: another job writes to it now") from None
        yield


def _claim(system: Any, root: str, output: str, job: dict[str, Any]) -> None:
    """Write job.json, or compare with the one of an earlier run.

    Raises:
        UserError: the folder holds something else, or an earlier run had another repository, input or options.
    """
    from pyarrow import fs

    found = files.read(system, f"{root}/{JOB}")
    if found is None:
        there = [files.name_of(each.path) for each in system.get_file_info(fs.FileSelector(root))]
        others = [name for name in there if not name.startswith(".") and name != f"{JOB}.part"]
        if others:
            raise UserError(f"{output}: holds other files ({', '.join(sorted(others)[:3])}); name an empty folder")
        files.write(system, f"{root}/{JOB}", json.dumps(job, indent=2).encode())
        return
    try:
        earlier = json.loads(found)
    except ValueError:
        raise UserError(f"{output}/{JOB}: is damaged; name an empty folder") from None
    now = json.loads(json.dumps(job))
    changed = {"repository": "the model repository, class set or labels", "input": "the input"}
    options = ("details", "embeddings", "outlier_score", "columns", "accept_only", "provider")
    for name in ("format", "repository", "input", *options):
        if earlier.get(name) != now.get(name):
            what = changed.get(name, f"the option {name}")
            raise UserError(f"{output}: was begun with another state of {what}; name an empty folder")


def _settle(system: Any, root: str) -> tuple[str, ...]:
    """Make what a kill left clear to Ray's recovery, and return how the names of the files begin that it will remove.

    Ray commits a file by renaming X.pending.parquet to X.parquet in the checkpoint. Where a node is lost, it may write
    a committed file again; a kill meanwhile leaves both. Recovery would then remove the file, and still take its rows
    for done. So the commit is withdrawn, and the rows are answered again.
    """
    from pyarrow import fs

    there = system.get_file_info(fs.FileSelector(f"{root}/{CHECKPOINT}", allow_not_found=True))
    names = {each.path for each in there}
    pending = [path.removesuffix(PENDING) for path in names if path.endswith(PENDING)]
    for path in pending:
        if f"{path}.parquet" in names:
            system.delete_file(f"{path}.parquet")
    return tuple(files.name_of(path) for path in pending)


def _write_none(system: Any, root: str, schema: pa.Schema) -> None:
    """Write a file without rows, from which readers take the schema where no row was kept."""
    from pyarrow import parquet

    folder = f"{root}/{DATA}/{KEPT}=yes"
    system.create_dir(folder, recursive=True)
    schema = schema.remove(schema.get_field_index(KEPT))
    parquet.write_table(schema.empty_table(), f"{folder}/none.parquet", filesystem=system, compression="zstd")


def _clear(system: Any, root: str, accept_only: bool) -> None:
    """Remove what a finished job needs no more."""
    from pyarrow import fs

    gone = [f"{root}/{CHECKPOINT}", *([f"{root}/{DATA}/{KEPT}=no"] if accept_only else [])]
    for path in gone:
        if system.get_file_info(path).type == fs.FileType.Directory:
            system.delete_dir(path)
