"""What DICOM files say of their pictures: columns of the index, for `data.columns={group: PatientID}`."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from data.layouts.readers import Described, Sidecar
from utils.io.files import Json
from utils.io.memo import in_threads, measure_once

_CACHE = Path("outputs/cache/dicom.jsonl")
_FIELDS = ["PatientID", "StudyDate", "Modality"]


def read_fields(root: Path, paths: Sequence[str]) -> Described:
    """Return the fields of each DICOM file, by path; none without pydicom, which the pictures need, too."""
    if find_spec("pydicom") is None:
        return {}
    files = [root / path for path in paths]
    rows = measure_once(files, lambda missing: in_threads(_read, missing), _CACHE, "reading the fields of DICOM files")
    return {path: Sidecar(more=row) for path, row in zip(paths, rows)}


def _read(file: Path) -> Json:
    """Return the fields that a file has."""
    import pydicom

    try:
        data = pydicom.dcmread(file, specific_tags=_FIELDS, stop_before_pixels=True)
    except Exception:  # any type; reading the picture names the file
        return {}
    return {name: str(data[name].value) for name in _FIELDS if data.get(name)}
