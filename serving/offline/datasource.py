"""An Input as a Ray Data source, and the actor that answers for it. This module imports Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import ray
from pyarrow import fs
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.checkpoint import IdColumnCheckpointManager
from ray.data.datasource import ReadTask

from vilu.serving.offline.blocks import IMAGE, KEPT, PATH, place_of
from vilu.serving.offline.inputs import Input
from vilu.serving.offline.scorer import Scorer, beside
from vilu.serving.offline.summary import check_bad

JUDGED = 1000  # rows seen before a share of bad images stops a job whose size is unknown


class Rows(Datasource):
    """The rows of an Input. Each task reads a file, a row group, or a stretch of a folder's listing."""

    def __init__(self, source: Input) -> None:
        super().__init__()
        self.source = source

    def get_name(self) -> str:
        return self.source.kind.capitalize()

    def estimate_inmemory_data_size(self) -> int | None:
        return None if self.source.kind == "images" else sum(unit.size for unit in self.source.units)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                read,
                BlockMetadata(
                    num_rows=rows if rows >= 0 else None, size_bytes=size or None, input_files=None, exec_stats=None
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for read, rows, size in self.source.tasks()
        ]


class Answerer:
    """The actor of a job: a Scorer that loads once, and counts bad images.

    Args:
        arguments: what the Scorer takes.
        tally: the actor that counts for the whole job; None counts nothing.
        mark: whether to add the column KEPT.
    """

    def __init__(self, arguments: dict[str, Any], tally: Any = None, mark: bool = False) -> None:
        self.scorer = Scorer(**arguments)
        self.tally, self.mark, self.told = tally, mark, None

    def __call__(self, table: pa.Table) -> pa.Table:
        columns = (table[name] if name in table.column_names else None for name in (IMAGE, PATH))
        answers = self.scorer.answers(self.scorer.read(*columns), place_of(table["row_id"].to_numpy()))
        if self.tally is not None:
            if self.told is not None:
                ray.get(self.told)  # raises where the limit of bad images is passed
            self.told = self.tally.add.remote(len(answers), len(answers) - answers["error"].null_count)
        rows = beside(table.drop_columns([name for name in (IMAGE, PATH) if name in table.column_names]), answers)
        if self.mark:
            kept = pc.if_else(rows["accept"].fill_null(False), "yes", "no")
            rows = rows.append_column(KEPT, kept.cast(pa.string()))
        return rows


class Finished(IdColumnCheckpointManager):
    """Ray's checkpoint manager, which reads the finished rows here instead of in a Dataset of its own.

    That Dataset has actors which no failing node may touch, though a job often goes on just after a node has failed.
    """

    def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> tuple[Any, int]:
        """Return the sorted row ids (N,) int64 in the object store, and their bytes; (None, 0) where there are none."""
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        selector = fs.FileSelector(self.checkpoint_path_unwrapped, allow_not_found=True)
        paths = [each.path for each in self.filesystem.get_file_info(selector) if each.path.endswith(".parquet")]
        if not paths:
            return None, 0
        table = ds.dataset(paths, filesystem=self.filesystem, format="parquet").to_table(columns=[self.id_column])
        ids = np.sort(table[self.id_column].to_numpy())
        return ray.put(ids), ids.nbytes


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Tally:
    """Counts rows and bad images of a whole job, and ends it where there are too many bad ones.

    Args:
        total: rows of the job; None where only reading says.
        share: the share of bad images that is one too many.
        rows: rows that earlier runs wrote.
        bad: bad images among them.
    """

    def __init__(self, total: int | None, share: float, rows: int = 0, bad: int = 0) -> None:
        self.total, self.share, self.rows, self.bad = total, share, rows, bad

    def add(self, rows: int, bad: int) -> None:
        self.rows, self.bad = self.rows + rows, self.bad + bad
        of = self.total if self.total is not None else self.rows if self.rows >= JUDGED else None
        if bad and of is not None:
            check_bad(self.bad, of, self.share)
