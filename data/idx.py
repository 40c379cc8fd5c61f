"""IDX files, the format of MNIST and of the collections made like it, written as class folders of PNG files.

torchvision reads them. The files may come from strangers, so a gzipped one must not unpack to more than images do.
"""

import gzip
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from utils.errors import UserError
from utils.io.files import fsync_path, output_errors, read_json, sha256_file, write_json

# Split -> the names of its images and of its labels, each plain or with `.gz`.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MARKER = "idx.json"  # written last: a folder that has it is complete
VERSION = 1

_GZIP = b"\x1f\x8b"
# Limits of what a gzipped file unpacks to. MNIST unpacks to 5 times its size, Fashion-MNIST to 2; deflate reaches 1032.
_MAX_RATIO, _FREE_BYTES = 100, 2**20


class Split(NamedTuple):
    """The images [N, H, W] and labels [N] of one split, both uint8, and the file of the labels."""

    images: np.ndarray
    labels: np.ndarray
    labels_file: Path


def idx_to_folders(
    source: str, root: str, class_names: Sequence[str] | None, progress: Callable[[int, int], None] | None = None
) -> bool:
    """Write the IDX files of folder `source` as root/{train,val}/<class>/00000.png; returns False if they are there.

    class_names: one for each label; None gives the labels themselves, padded with zeros. The number of a file is its
    position in the IDX file. The folder appears whole or not at all. progress: called with the images written and their
    number.

    Raises UserError (`source`, `class_names`, `data.root`) for files that are missing, damaged or do not belong
    together, for names that do not fit the labels, and for a `root` that holds anything else.
    """
    folder = Path(os.path.abspath(root))
    files = {split: tuple(find_idx(source, name) for name in names) for split, names in FILES.items()}
    about = {
        "version": VERSION,
        "class_names": None if class_names is None else list(class_names),
        "sha256": {file.name.removesuffix(".gz"): sha256_file(file) for pair in files.values() for file in pair},
    }
    if _is_complete(folder, about):
        return False
    splits = {split: _read_split(*pair) for split, pair in files.items()}
    names = _name_labels(splits, class_names)
    with output_errors("data.root", folder):
        partial = folder.with_name(f".{folder.name}.partial")
        if partial.exists():  # of a process that died
            shutil.rmtree(partial)
        _write_folders(partial, splits, names, progress)
        write_json(partial / MARKER, about)
        os.rename(partial, folder)
        fsync_path(folder.parent)
    return True


def encode_idx(items: np.ndarray) -> bytes:
    """Return a plain IDX file of uint8 items: images [N, H, W] or labels [N]."""
    return bytes((0, 0, 8, items.ndim)) + struct.pack(f">{items.ndim}I", *items.shape) + items.tobytes()


def find_idx(source: str, name: str) -> Path:
    """Return the file `name` of a folder, or `name`.gz. Raises UserError (`source`) where there is neither."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"source: {source!r} is not a folder; set source to the folder that holds {name} or {name}.gz")
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(
        f"source: {source!r} has neither {name} nor {name}.gz; an IDX collection has the four files "
        + ", ".join(name for names in FILES.values() for name in names)
    )


def read_idx(file: Path, axes: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzipped; axes: 1 for labels, 3 for images.

    Raises UserError (`source`) where the file is not one, holds more or less than its header claims, or nothing.
    """
    try:
        with open(file, "rb") as stream, tempfile.NamedTemporaryFile() as plain:
            packed = stream.read(len(_GZIP)) == _GZIP
            stream.seek(0)
            if packed:
                limit = _FREE_BYTES + _MAX_RATIO * file.stat().st_size
                content = gzip.GzipFile(fileobj=stream).read(limit + 1)
                if len(content) > limit:
                    raise _damaged(file, f"it unpacks to more than {_MAX_RATIO} times its size")
                plain.write(content)
                plain.flush()
            items = read_sn3_pascalvincent_tensor(plain.name if packed else str(file))
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError, AssertionError, KeyError, IndexError) as error:
        raise _damaged(file, str(error) or type(error).__name__) from None
    if items.dtype != torch.uint8 or items.ndim != axes or items.numel() == 0:
        raise _damaged(file, f"it holds {list(items.shape)} of {items.dtype}, not bytes on {axes} axes")
    return items.numpy()


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"source: {str(file)!r} is not the IDX file it should be: {why}; get the file again")


def _read_split(images_file: Path, labels_file: Path) -> Split:
    """Read one split. Raises UserError (`source`) where the two files count differently."""
    labels, images = read_idx(labels_file, 1), read_idx(images_file, 3)
    if len(images) != len(labels):
        raise UserError(
            f"source: {str(images_file)!r} has {len(images):,} images and {str(labels_file)!r} {len(labels):,} labels; "
            "use two files of one collection"
        )
    return Split(images, labels, labels_file)


def _name_labels(splits: dict[str, Split], class_names: Sequence[str] | None) -> list[str]:
    """Return the name of each label, from 0 on. Raises UserError for a label or a list of names that does not fit."""
    count = int(splits["train"].labels.max()) + 1
    if (other := int(splits["val"].labels.max())) >= count:
        raise UserError(
            f"source: {str(splits['val'].labels_file)!r} has the label {other}, and the training images have 0 to "
            f"{count - 1}; use files of one collection"
        )
    if class_names is None:
        return [f"{label:0{len(str(count - 1))}}" for label in range(count)]
    for name in class_names:
        if not name or name.startswith(".") or "/" in name or not name.isprintable() or len(os.fsencode(name)) > 255:
            raise UserError(f"class_names: {name!r} cannot name a folder; give a short name without '/' and first dot")
    if len(set(class_names)) != count or len(class_names) != count:
        raise UserError(
            f"class_names: {len(set(class_names))} different names for {count} labels, 0 to {count - 1}; give one name "
            "for each label"
        )
    return list(class_names)


def _is_complete(folder: Path, about: dict[str, object]) -> bool:
    """Tell whether these images are there already. Raises UserError (`data.root`) where something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = None
    if (folder / MARKER).is_file():
        try:
            found = read_json(folder / MARKER)
        except (OSError, ValueError):
            found = None
    if found == about:
        return True
    what = "was made of other files or with other class_names" if found is not None else "is not empty"
    raise UserError(
        f"data.root: {str(folder)!r} {what}, and is left alone; set data.root to a new folder, or remove this one"
    )


def _write_folders(
    root: Path, splits: dict[str, Split], names: list[str], progress: Callable[[int, int], None] | None
) -> None:
    """Write every image of every split into the folder of its class."""
    total, done = sum(len(split.labels) for split in splits.values()), 0
    for name, split in splits.items():
        folders = [f"{root}/{name}/{names[label]}" for label in range(len(names))]
        for label in np.unique(split.labels):
            os.makedirs(folders[label])
        digits = max(5, len(str(len(split.labels) - 1)))
        for index, (image, label) in enumerate(zip(split.images, split.labels)):
            Image.fromarray(image).save(f"{folders[label]}/{index:0{digits}}.png")
            done += 1
            if progress is not None and done % 500 == 0:
                progress(done, total)
