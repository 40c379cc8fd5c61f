"""The file names of a collection: what is an image, what describes images, and what is passed over."""

from importlib.util import find_spec
from os.path import splitext

# Raw photographs of cameras, which contain a preview. The preview is read.
_RAW = (
    ".nef .nrw .cr2 .cr3 .crw .arw .sr2 .srf .dng .orf .rw2 .raf .pef .srw .3fr .fff .iiq .x3f .rwl .erf .mef .mrw "
    ".kdc .dcr .mos"
)
RAW_SUFFIXES = tuple(_RAW.split())
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# What the packages of requirements-formats.txt read: by package, the module and the endings.
FURTHER = {
    "pillow-heif": ("pillow_heif", (".heic", ".heif", ".hif", ".heics", ".heifs")),
    "pillow-jxl-plugin": ("pillow_jxl", (".jxl",)),
    "rawpy": ("rawpy", RAW_SUFFIXES),
    "pydicom": ("pydicom", DICOM_SUFFIXES),
}
INSTALL = "make install-formats"
MISSING = {ending: name for name, (module, endings) in FURTHER.items() if not find_spec(module) for ending in endings}
_OF_PILLOW = (
    ".png .jpg .jpeg .jfif .webp .gif .bmp .dib .tif .tiff .avif .ppm .pgm .pbm .pnm .tga .ico .jp2 .j2k .jpx .jpf "
    ".j2c .jpc"
)
IMAGE_SUFFIXES = (
    *_OF_PILLOW.split(),
    *(ending for _, endings in FURTHER.values() for ending in endings if ending not in MISSING),
)
CONDITION = "-condlabel"  # of OneTrainer's `x-condlabel.png`, a picture that conditions, which nothing reads
MASK_ENDINGS = (".mask", "-masklabel", CONDITION)  # of `x.mask.png`, which belongs to the image `x`; OneTrainer's
SUFFIXES = (".caption", ".txt", ".json")  # of sidecars, files beside an image
SHARD_SUFFIXES = (".tar", ".arrow", ".parquet")
# Of these, a manifest, posts and the corrections are at the root alone.
PARQUET = "manifest.parquet"
JSONL = "manifest.jsonl"
CSV = "manifest.csv"
MANIFESTS = (PARQUET, JSONL, CSV)
POSTS = ("posts.parquet", "posts.jsonl")  # as Danbooru gives them
CORRECTIONS = "corrections.jsonl"  # of the page of view.py
UNDO = "corrections_undo.jsonl"  # of job=apply_corrections
GLYPHS = "glyphs.json"  # of the embedded collection
OURS = (*MANIFESTS, CORRECTIONS, UNDO, GLYPHS)
# What systems put beside pictures, in lower case: thumbnails and indexes, bins, snapshots, resource forks.
_SYSTEM_NAMES = (
    "@eadir @__thumb @tmp @sharebin @recycle @recently-snapshot #recycle #snapshot __macosx $recycle.bin recycler "
    "found.000 lost+found __pycache__"
)
SYSTEM_NAMES = {*_SYSTEM_NAMES.split(), "system volume information", "network trash folder", "temporary items"}
RESOURCE_FORK = "._"  # what macOS writes beside a file on disks of others begins so: no picture


def stem_of(path: str) -> str:
    """Return a path or a name without its ending."""
    return splitext(path)[0]


def suffix_of(path: str) -> str:
    """Return the ending of a path or a name in small letters, with its dot."""
    return splitext(path)[1].lower()


def is_remote(root: str) -> bool:
    """Return whether a root is a URL."""
    return "://" in root


def is_image_name(name: str) -> bool:
    """Return whether a file name has an image suffix, and is no mask."""
    return suffix_of(name) in IMAGE_SUFFIXES and not is_mask_name(name)


def is_dicom_name(name: str) -> bool:
    """Return whether an image is a DICOM file by its name, which may have no ending."""
    return name.lower().endswith(DICOM_SUFFIXES) or not name.lower().endswith(IMAGE_SUFFIXES)


def is_mask_name(name: str) -> bool:
    """Return whether a file name belongs to a mask."""
    return masked_stem(name) is not None


def is_raw(name: str) -> bool:
    """Return whether a file name is that of a raw photograph."""
    return name.lower().endswith(RAW_SUFFIXES)


def masked_stem(name: str) -> str | None:
    """Return the name, without its suffix, of the image that a mask belongs to; None if it is no mask."""
    stem, suffix = splitext(name)
    if not stem.lower().endswith(MASK_ENDINGS) or suffix.lower() not in IMAGE_SUFFIXES:
        return None
    return next(stem[: -len(ending)] for ending in MASK_ENDINGS if stem.lower().endswith(ending))


def is_passed_over(name: str) -> bool:
    """Return whether the name of a file or folder is hidden or a system's."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_sidecar(path: str) -> bool:
    """Return whether a path below the root has the ending of a sidecar, and is not ours."""
    return path.lower().endswith(SUFFIXES) and path not in OURS


def is_data(path: str) -> bool:
    """Return whether a file is an image, a mask, a shard or ours, by its path below the root."""
    return path.lower().endswith((*IMAGE_SUFFIXES, *SHARD_SUFFIXES)) or path in OURS
