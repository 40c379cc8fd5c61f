"""What every tool is given."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.scan import check_root
from utils.io.files import output_errors, write_json, write_text
from utils.record.html_page import FILE, write_page
from utils.record.logging import get_logger
from utils.record.report_files import TableRow, write_report

log = get_logger(__name__)

_NAMED = 10  # files in the log
_DETAIL = re.compile(r": | \(|; ")


@dataclass(frozen=True)
class Work:
    """A job and its collection.

    apply: change files; False: list what would change. report: the folder of pages, tables and lists. trash: the folder
    of moved files and journals.
    """

    job: str
    data: DataConfig
    apply: bool
    report: Path
    trash: Path

    @property
    def root(self) -> Path:
        """The collection's folder."""
        return check_root(self.data.root)

    def list_files(self, reasons: Mapping[str, str]) -> Path:
        """Write one JSON line for each file, {"path", "reason"}; log the first of them, and how many by reason.

        reasons: by path; what follows a colon or a parenthesis differs between files. Raises UserError (`report`).
        """
        for path, reason in list(reasons.items())[:_NAMED]:
            log.info("%s: %s", path, reason)
        for reason, count in Counter(_DETAIL.split(reason, maxsplit=1)[0] for reason in reasons.values()).most_common():
            log.info("%s: %s files", reason, f"{count:,}")
        file = self.report / f"{self.job}.jsonl"
        lines = [json.dumps({"path": path, "reason": reason}, ensure_ascii=False) for path, reason in reasons.items()]
        with output_errors("report", file):
            write_text(file, "".join(line + "\n" for line in lines))
        return file

    def save_report(
        self,
        figures: Mapping[str, float],
        tables: Mapping[str, Sequence[TableRow]],
        images: Mapping[str, np.ndarray],
    ) -> Path:
        """Write figures, tables and images [H, W, 3] as one HTML page, as JSON, and as CSV and PNG files.

        Returns the page. Raises UserError (`report`).
        """
        folder = self.report / self.job
        with output_errors("report", folder):
            write_report(folder, tables, images)
            write_json(folder / f"{self.job}.json", {"figures": figures, "tables": tables})
            write_page(folder / FILE, f"{self.job}: {self.root}", figures, tables, images)
        return folder / FILE
