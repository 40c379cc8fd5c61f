"""The schema of `data`. Values and defaults are in conf/data/."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from data.collection.concepts import ConceptConfig
from data.layouts.scan import TableChoice
from data.layouts.table import TARGET
from utils.config.bounds import BelowOne, Pixels, Side, Two, between
from utils.config.schema import PathText, Strict
from utils.formats.background import Background
from utils.io.files import Json


class CacheConfig(Strict):
    """Caches of decoded images (docs/loading.md).

    memory_gib: shared memory of a node while training; 0: off. disk_gib: maximum size of the files in `folder`; 0: off.
    """

    memory_gib: Literal["auto"] | between(float, 0, 1e6)
    folder: PathText
    disk_gib: between(float, 0, 65_536)


_Text = Annotated[str, BeforeValidator(str)]  # of a number, too
ColumnName = Literal["path", "label", "target", "tags", "caption", "split", "rating", "weight", "group", "id"]


class DataConfig(Strict):
    """A user's collection, or the embedded one, which is drawn into `root` if it is missing.

    validation_fraction: used only if the collection has no validation split; auto: 0.1, or 0 below 100 images. A fold,
    such as [2, 5], replaces a validation split.
    on_bad_sidecar: a script that reads a bad field of a sidecar stops, or skips that field.
    group: what tells images that belong together, which a split keeps on one side; a column `group` decides first.
    exclude_copies: leave out training images that belong together with images of another split.
    background: the colour behind transparent images; null: white in training, else the one stored with the weights.
    trigger: a word before each caption that lacks it, and the caption of an image without texts (finetune_sdxl.py).
    concepts: the folders of the collection; null: all of `root`, or its folders `10_name` (finetune_sdxl.py).
    corrections: apply the decisions of reviewers, if the collection has a `corrections.jsonl`.
    table: the user's table of the images, relative to root or the working directory; auto: the table in the folder;
    none. columns: the table's names for our columns. splits: whether names of folders, tables and shards say splits, or
    the split of each name, and of each value of a column `split`.
    """

    name: Literal["image_folder", "glyphs"]
    root: PathText
    validation_fraction: Literal["auto"] | BelowOne | Two[Side]
    on_bad_sidecar: Literal["stop", "skip"]
    max_pixels: Pixels
    background: Background | None
    cache: CacheConfig
    group: Literal["auto", "names", "times", "copies", "none"]
    exclude_copies: bool
    concepts: list[ConceptConfig] | None
    trigger: str | None
    corrections: bool
    table: Literal["auto", "none"] | PathText
    columns: dict[ColumnName, str] | None
    splits: bool | dict[_Text, Literal["train", "val", "test"]]

    def choice(self) -> TableChoice:
        """Return the choice of names by `table`, `columns` and `splits`."""
        columns = {TARGET if ours == "target" else ours: theirs for ours, theirs in (self.columns or {}).items()}
        return TableChoice(self.table, columns, self.splits, self.group, self.exclude_copies)

    def index_settings(self) -> Json:
        """Return the settings that an index depends on, as arguments of `index_collection`."""
        names = ("validation_fraction", "on_bad_sidecar", "corrections")
        stated = {name: getattr(self, name) for name in names}
        return {"concepts": self.concepts or (), **stated, **self.choice()._asdict()}


def _refuse_concepts(data: DataConfig) -> DataConfig:
    if data.concepts:
        raise ValueError("data.concepts: are for finetune_sdxl.py; set it to null, and data.root to one folder")
    if data.trigger is not None:
        raise ValueError(f"data.trigger: {data.trigger!r} is for the captions of finetune_sdxl.py; remove it")
    return data


WholeData = Annotated[DataConfig, AfterValidator(_refuse_concepts)]  # for scripts that read no concepts
