"""Parquet files: nothing that unpacks to far more than it can hold is read."""

from pathlib import Path
from typing import Protocol

from utils.errors import UserError

# Limits of an unpacked Parquet manifest. For a million numbered paths the densest writers store 18 rows in a byte and
# compress text 150-fold.
_ROWS_PER_BYTE, _MAX_RATIO, _FREE_BYTES = 64, 500, 64 * 2**20


class ParquetMetadata(Protocol):
    """The used part of pyarrow.parquet.FileMetaData."""

    num_rows: int
    num_row_groups: int

    def row_group(self, index: int) -> object:
        """Return a row group, which has total_byte_size."""


def refuse_parquet_bomb(file: Path, metadata: ParquetMetadata, key: str) -> None:
    """Raise UserError (`key`) where a Parquet file unpacks to more than a list of different images does."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    unpacked, size = sum(group.total_byte_size for group in groups), file.stat().st_size
    if metadata.num_rows > _ROWS_PER_BYTE * size or unpacked > _FREE_BYTES + _MAX_RATIO * size:
        raise UserError(
            f"{key}: {str(file)!r} has {size:,} bytes and claims {metadata.num_rows:,} rows and {unpacked:,} bytes "
            "unpacked, more than a list of different images has; make it again"
        )
