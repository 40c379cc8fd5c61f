"""A row for each image of an evaluation, in a Parquet file."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from utils.contracts import Batch
from utils.io.files import write_atomically
from utils.ranks import distributed


def write_images(
    file: Path, batches: Iterable[Batch], describe: Callable[[Batch], pa.Table], paths: pa.Array, root: str
) -> None:
    """Write `path`, the columns of `describe` and `rank` of all readable images, as the batches arrive.

    describe: returns a row for each sample of a batch, with a column `loss`. rank: from 1, the highest loss, where
    network and label disagree most. paths: of all rows of the collection. root: its folder, kept as metadata. All ranks
    call it together; rank 0 writes.
    """

    def rows() -> Iterable[pa.Table]:
        for batch in batches:
            table = describe(batch).append_column("id", pa.array(batch["sample_id"].tolist(), pa.int64()))
            read = table.filter(pa.array((batch["weight"] > 0).tolist()))
            yield pa.concat_tables(distributed.gather_objects(read)).sort_by("id")

    def write(target: Path) -> None:
        unranked, writer, losses = target.with_suffix(".unranked"), None, []
        for table in rows():
            losses.append(table["loss"].to_numpy())
            table = table.add_column(0, "path", pc.take(paths, table["id"])).drop_columns("id")
            writer = writer or pq.ParquetWriter(unranked, table.schema)
            writer.write_table(table)
        writer.close()
        ranks = np.empty(sum(map(len, losses)), np.int64)
        ranks[np.argsort(-np.concatenate(losses), kind="stable")] = np.arange(1, len(ranks) + 1)
        schema = table.schema.append(pa.field("rank", pa.int64())).with_metadata({"root": root})
        with pq.ParquetFile(unranked) as source, pq.ParquetWriter(target, schema) as writer:
            for part in source.iter_batches():
                writer.write_batch(part.append_column("rank", pa.array(ranks[: len(part)])))
                ranks = ranks[len(part) :]
        unranked.unlink()

    if distributed.is_main():
        write_atomically(file, write)
    else:
        for _ in rows():
            pass
