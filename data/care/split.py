"""Split a collection anew into training and validation: a share of each class, near-duplicates on one side."""

from typing import Literal

import pyarrow as pa

from data.care.exclude import read_own_manifest
from data.care.tool import Tool
from data.config import DataConfig
from data.manifest_writer import save_manifest
from data.scan import check_root
from data.table import assign_validation, replace_column
from utils.errors import UserError


class Split(Tool):
    """Write the split column of the manifest that job=manifest made, by its rule; rows of a test split stay.

    apply: write it; False: say what it would be.
    """

    name: Literal["split"]
    apply: bool

    def run(self, data: DataConfig) -> str:
        """Split. Raises UserError (`data.root`, `data.validation_fraction`)."""
        if data.validation_fraction == 0:
            raise UserError("data.validation_fraction: 0.0 leaves nothing to validate on; set a share, such as 0.05")
        root = check_root(data.root)
        table = read_own_manifest(root)
        old = table["split"].to_pylist()
        rows = pa.array([number for number, split in enumerate(old) if split != "test"])
        chosen = table.take(rows)
        everything_trains = pa.array(["train"] * len(rows), pa.string())
        chosen = assign_validation(
            replace_column(chosen, "split", everything_trains), data.validation_fraction, "job=split"
        )
        for number, split in zip(rows.to_pylist(), chosen["split"].to_pylist()):
            old[number] = split
        line = f"{old.count('val'):,} of {len(rows):,} images for validation"
        if not self.apply:
            return f"{line}; set job.apply=true to write it into the manifest"
        save_manifest(root, replace_column(table, "split", pa.array(old, pa.string())), "write_manifest")
        return line
