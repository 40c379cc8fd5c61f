"""Split a collection anew into training and validation: a share of each class, near-duplicates on one side."""

from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from data.care.finder import read_own_manifest
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
        is_ours = pc.not_equal(table["split"], "test")
        ours = table.filter(is_ours)
        ours = replace_column(ours, "split", pa.array(["train"] * len(ours), pa.string()))
        splits = assign_validation(ours, data.validation_fraction, "job=split")["split"].combine_chunks()
        line = f"{pc.sum(pc.equal(splits, 'val')).as_py():,} of {len(ours):,} images for validation"
        if not self.apply:
            return f"{line}; set job.apply=true to write it into the manifest"
        whole = pc.replace_with_mask(table["split"].combine_chunks(), is_ours.combine_chunks(), splits)
        save_manifest(root, replace_column(table, "split", whole), "write_manifest")
        return line
