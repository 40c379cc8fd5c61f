"""A Parquet file with a row for each image of an evaluation."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from utils.contracts import Batch
from utils.io.files import write_atomically
from utils.ranks import distributed


@dataclass
class ImageRows:
    """Describe the images of an evaluation while its batches are read. All ranks use it together.

    describe: returns a row for each sample of a batch, with a column `loss`.
    """

    describe: Callable[[Batch], pa.Table]
    tables: list[pa.Table] = field(default_factory=list)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and keep the rows of their readable images."""
        for batch in batches:
            yield batch
            table = self.describe(batch).append_column("id", pa.array(batch["sample_id"].tolist(), pa.int64()))
            self.tables += distributed.gather_objects(table.filter(pa.array((batch["weight"] > 0).tolist())))

    def write(self, file: Path, paths: pa.Array, root: str) -> None:
        """Write `path`, the columns of `describe`, and `rank`: 1 for the highest loss.

        paths: of all rows of the collection. root: the folder of the collection, for the metadata. Rank 0 writes.
        """
        if not distributed.is_main():
            return
        table = pa.concat_tables(self.tables).sort_by("id")
        ranks = pc.rank(table["loss"], "descending", tiebreaker="first").cast(pa.int64())
        table = table.add_column(0, "path", pc.take(paths, table["id"])).drop_columns("id")
        table = table.append_column("rank", ranks).replace_schema_metadata({"root": root})
        write_atomically(file, partial(pq.write_table, table))
