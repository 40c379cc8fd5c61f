"""Sort photographs of five public repositories into the collections of bench/minutes.py.

    python bench/draw_collections.py CLONES FOLDER        FOLDER/NAME/{train,val}/CLASS/*.jpg, links to the clones

CLONES has a clone of each repository of COLLECTIONS, by its name. No rule and no constant of ours was chosen on these:

| name | to train, to judge | classes | what |
|---|---|---|---|
| trash | 1,925, 602 | 6 | waste on a board, 512 px |
| flowers | 3,245, 1,072 | 5 | flowers, 128 px |
| grocery | 2,640, 2,485 | 81 | fruit, vegetables and cartons in shops, 348 px; its authors chose the sides |
| tiles | 942, 402 | 6 | faults of magnetic tiles, grey; photographs of one tile are on one side |
| cifar | 5,046, 2,016 | 10 | a tenth of CIFAR-10's images to train, a fifth of its test images, 32 px |
"""

import re
import sys
from hashlib import sha256
from pathlib import Path

# Name -> the repository, the pattern of its images, and patterns of a path: its class, and what decides its side.
COLLECTIONS = {
    "trash": ("Trash-Classification-", "dataset-resized/*/*.jpg", r"(\w+)/[^/]*$", r"([^/]*)$"),
    "flowers": ("flower_classification", "flowers/*/*.jpg", r"(\w+)/[^/]*$", r"([^/]*)$"),
    "grocery": ("GroceryStoreDataset", "dataset/t*/**/*.jpg", r"([^/]+)/[^/]*$", r"dataset/(\w+)/"),
    "tiles": ("Magnetic-tile-defect-datasets.", "MT_*/Imgs/*.jpg", r"MT_(\w+)/", r"num_(.*)$"),
    "cifar": ("CIFAR-10-images", "t*/*/*.jpg", r"(\w+)/[^/]*$", r"^(\w+)/"),
}
SHARE = {"cifar": 0.1}  # of its images; 1 of the others
JUDGED = 0.25  # where authors chose no side


def draw_share(name):
    """Return a number from 0 to 1 that a name always has."""
    return int.from_bytes(sha256(name.encode()).digest()[:4]) / 2**32


def main(clones, folder):
    for collection, (repository, pattern, class_of, side_of) in COLLECTIONS.items():
        root = Path(clones, repository).absolute()
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            if draw_share(name) >= SHARE.get(collection, 1):
                continue
            side = re.search(side_of, name)[1]
            if side not in ("train", "test"):
                side = "test" if draw_share(side) < JUDGED else "train"
            link = Path(folder, collection, side.replace("test", "val"), re.search(class_of, name)[1], path.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
