"""What DICOM files say of their pictures: columns of the index, for `data.columns={group: PatientID}`."""

from pathlib import Path

from data.layouts.names import DICOM_SUFFIXES, is_image_name
from data.layouts.scan import Folder
from data.layouts.sidecars import Sidecar
from utils.io.files import Json
from utils.io.memo import in_threads, measure_once

_CACHE = Path("outputs/cache/dicom.jsonl")
_FIELDS = ["PatientID", "StudyDate", "Modality"]


def read_fields(folder: Folder) -> dict[str, Sidecar]:
    """Return the fields of each DICOM file, by path."""
    paths = [path for path in folder.images if path.lower().endswith(DICOM_SUFFIXES) or not is_image_name(path)]
    files = [folder.root / path for path in paths]
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
