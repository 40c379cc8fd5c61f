"""DICOM: the levels that window and photometric interpretation say, frames, files without an ending, and columns."""

import io

import numpy as np
import pytest

from data.images.measure import measure_file
from data.images.open import TOO_LARGE, UNSUPPORTED
from data.load import load_collection
from data.tools.predictions import list_images
from tests.support import data_config, read_image

pydicom = pytest.importorskip("pydicom", reason="make install-formats")


def dicom(pixels, bits=8, photometric="MONOCHROME2", **fields):
    """Return a file of one frame [H, W], several [N, H, W], or one of colours [H, W, 3]."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    is_colour = photometric == "RGB"
    *frames, data.Rows, data.Columns = pixels.shape[:-1] if is_colour else pixels.shape
    values = {"NumberOfFrames": frames[0]} if frames else {}
    values |= {"SamplesPerPixel": 3, "PlanarConfiguration": 0} if is_colour else {"SamplesPerPixel": 1}
    values |= {"BitsAllocated": 8 * pixels.itemsize, "BitsStored": bits, "HighBit": bits - 1}
    values |= {"PixelRepresentation": int(pixels.dtype.kind == "i"), "PhotometricInterpretation": photometric}
    for name, value in (values | fields | {"PixelData": pixels.tobytes()}).items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def grey(*levels, kind=np.uint16):
    return np.array([levels], kind)


RESCALED = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [40, 300], "WindowWidth": [400, 1500]}
PICTURES = {
    "8 bits": (dicom(grey(0, 128, 255, kind=np.uint8)), [0, 128, 255]),
    "12 bits": (dicom(grey(0, 2048, 4095), 12), [0, 128, 255]),
    "16 bits": (dicom(grey(0, 32768, 65535), 16), [0, 128, 255]),
    "signed": (dicom(grey(-2048, 0, 2047, kind=np.int16), 12), [0, 128, 255]),
    "white is zero": (dicom(grey(0, 2048, 4095), 12, "MONOCHROME1"), [255, 127, 0]),
    "window": (dicom(grey(999, 1500, 2001), 12, WindowCenter=1500.5, WindowWidth=1001), [0, 128, 255]),
    "units": (dicom(grey(0, 864, 1064, 1264), 12, **RESCALED), [0, 0, 128, 255]),
    "colours": (dicom(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8), photometric="RGB"), [255, 0]),
    "frames": (dicom(np.arange(10, dtype=np.uint8).reshape(5, 1, 2)), [4, 5]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_levels_are_as_the_file_says(name, tmp_path):
    content, levels = PICTURES[name]
    for file in (tmp_path / "x.dcm", tmp_path / "IM0001"):
        file.write_bytes(content)
        assert read_image(file, 3, 100)[0, :, 0].tolist() == levels
    fact = measure_file(tmp_path / "x.dcm")
    assert (fact.format, fact.width, "frames" in (fact.remark or "")) == ("DICOM", len(levels), name == "frames")


def test_a_report_a_large_and_a_broken_file_are_named(tmp_path):
    whole = dicom(grey(*range(20)), 12)
    (tmp_path / "x.dcm").write_bytes(whole)
    assert measure_file(tmp_path / "x.dcm", 10).kind == TOO_LARGE
    (tmp_path / "x.dcm").write_bytes(whole[:-9])
    assert measure_file(tmp_path / "x.dcm").is_damaged
    (tmp_path / "x.dcm").write_bytes(whole[:280])
    assert measure_file(tmp_path / "x.dcm").kind == UNSUPPORTED


def test_fields_are_columns_and_a_patient_is_a_group(tmp_path):
    names = ["cat/1.2.840.1", "cat/IM2", "cat/x.dcm", "dog/x.dcm"]
    for name, patient in zip(names, "abab"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = dicom(grey(0, 9), 12, PatientID=patient, StudyDate="20240131", Modality="CT")
        (tmp_path / name).write_bytes(content)
    (tmp_path / "DICOMDIR").write_bytes(content)
    assert [str(path.relative_to(tmp_path)) for path in list_images(str(tmp_path), "input").paths] == names
    table = load_collection(data_config(root=str(tmp_path))).table
    assert table.select(["path", "label", "PatientID", "StudyDate", "Modality"]).to_pylist()[3] == {
        "path": "dog/x.dcm", "label": "dog", "PatientID": "b", "StudyDate": "20240131", "Modality": "CT"
    }  # fmt: skip
    table = load_collection(data_config(root=str(tmp_path), columns={"group": "PatientID"})).table
    assert table["group"].to_pylist() == [0, 1, 0, 1]
