"""The jobs of prepare.py: their keys, and the names of the functions that run them. Values are in conf/job/.

A job reads files and writes new ones. It never moves, changes or deletes an image.
"""

import os
import re
import zlib
from pkgutil import resolve_name
from typing import Annotated, Literal

from pydantic import Field

from data.config import DataConfig
from data.layouts.names import is_remote
from data.layouts.walk import check_root
from data.tags.rules import VocabularyConfig
from utils.config.bounds import Count, DurationOrZero, Share, Side, between
from utils.config.schema import PathText, Strict, TermsText
from utils.start import open_name

NOTHING = "dry run: nothing is written"
MAINS = {  # the function that runs each job, as `module:function`
    "check": "data.tools.check:check",
    "manifest": "data.tools.manifest:write_manifest",
    "vocabulary": "data.tools.vocabulary:collect_vocabulary",
    "pack": "data.tools.pack:pack",
    "duplicates": "data.tools.duplicates:exclude_duplicates",
    "filter": "data.tools.exclude:filter_images",
    "copy": "data.tools.copy:copy_images",
    "apply_corrections": "data.tools.apply_corrections:apply_corrections",
    "cache": "data.tools.cache:manage_caches",
    "machine": "data.tools.machine:describe_machine",
    "labels": "engine.frozen.labels_job:rank_labels",
    "import": "sdxl.imports.convert:convert_config",
}


class Tool(Strict):
    """A job of prepare.py."""

    name: str

    def check(self, data: DataConfig) -> str:
        """Check the settings without doing anything (`dry_run`); return a line for the log."""
        if not is_remote(data.root):
            check_root(data.root)
        return NOTHING

    def run(self, data: DataConfig) -> str:
        """Run the job; return a line for the log. Raises UserError."""
        return open_name(MAINS[self.name])(self, data)


class Reporting(Tool):
    """A job that writes reports into the folder `report`; null: the collection's own folder, `report_folder`."""

    report: PathText | None

    def run(self, data: DataConfig) -> str:
        """Run the job; return a line for the log. Raises UserError."""
        job = self.changed({"report": self.report or report_folder("outputs", data.root)})
        return super(Reporting, job).run(data)


def report_folder(runs: str, root: str) -> str:
    """Return the folder below `runs` for reports about a collection. Two collections may have equal names."""
    whole = os.path.realpath(root)
    name = re.sub(r"\W+", "_", os.path.basename(whole))[:60]
    return f"{runs}/care/{name}-{zlib.crc32(whole.encode()):08x}"


class Check(Reporting):
    """Count the values of a collection, list the faults, and write both as an HTML page.

    verify: decode every image, to find unreadable images and to measure formats, brightness and sharpness.
    """

    name: Literal["check"]
    verify: bool


class Manifest(Tool):
    """Check the images of `data.root` and write a manifest with the SHA-256 of every file.

    verify: decode every image, and fill in the columns _DECODED and `group` (see `find_groups`), which the splits
    keep together. Damaged images get weight 0 and a reason; without verify, only files that cannot be opened.
    """

    name: Literal["manifest"]
    verify: bool


class CollectVocabulary(Tool, VocabularyConfig):
    """Collect the tags of `data.root` into the vocabulary file `output`.

    Tags that differ in separators alone go into x_aliases.csv beside x.csv, in the form of `task.aliases`. append_to:
    a vocabulary whose rows come first, unchanged.
    """

    name: Literal["vocabulary"]
    output: PathText
    append_to: PathText | None


class Pack(Tool):
    """Write the images as tar shards of about `shard_mib` MiB, and their manifest, into the folder `output`."""

    name: Literal["pack"]
    output: PathText
    shard_mib: between(int, 1, 2**20)


class Finder(Reporting):
    """A job that finds images to exclude from training. apply: exclude them."""

    apply: bool


class Duplicates(Finder):
    """Write a table of groups of duplicates, and exclude or list all images but one of each group.

    An image of the test split is kept first, then the image with the most labels, ratings and tags, then an image with
    a caption, then the largest. Images of the test split stay, and so do images with a label, rating or tag that the
    kept image lacks: these are listed apart. match: near: one picture in several sizes, formats or brightnesses, or
    mirrored; exact: equal bytes.
    """

    name: Literal["duplicates"]
    match: Literal["near", "exact"]


class Filter(Finder):
    """Exclude or list the images that terms find (data/collection/search.py); null: restore excluded images."""

    name: Literal["filter"]
    find: TermsText | None


class Copy(Tool):
    """Copy the images that terms find (null: all), and their sidecars and rows; nothing is overwritten.

    find: see data/collection/search.py. per_class, count: see `choose_part`. to: the target folder. Files that exist
    there with the same size and modification time are skipped, so a killed job continues.
    """

    name: Literal["copy"]
    to: PathText
    find: TermsText | None
    per_class: Count | Share | None
    count: Count | None


class ApplyCorrections(Tool):
    """Write the corrections of corrections.jsonl into sidecars. undo: restore the sidecars.

    The file UNDO has a line for each sidecar: the bytes before (null: no file) and after. A label is written into
    `x.json`, which readers prefer to the folder's name, and tags into the file that has the tags.
    """

    name: Literal["apply_corrections"]
    undo: bool


class Cache(Tool):
    """List the caches and what their records hold; with `apply`, remove the records unused for `unused_days`.

    fill: decode all images into `data.cache.folder`, as training with this `shortest_px` reads them, and with
    `data.cache.disk_gib` as for training; grey: one channel.
    """

    name: Literal["cache"]
    unused_days: DurationOrZero
    apply: bool
    fill: bool | Literal["grey"]
    shortest_px: Side | None


class Machine(Tool):
    """Describe the machine. device, precision, compile: of `runtime`, as a training would need them."""

    name: Literal["machine"]
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: Literal["auto"] | bool
    run_dir: PathText


class Labels(Reporting):
    """Rank labels and tags by how probably they are wrong, and images without a label by what one would teach.

    weights: a run or a file that gives the features; null: a network that has not seen the labels.
    """

    name: Literal["labels"]
    weights: PathText | None


class Import(Tool):
    """Read `source`, the settings of another program, and write `output`, a file for experiment=FILE."""

    name: Literal["import"]
    source: PathText
    output: PathText

    def check(self, data: DataConfig) -> str:
        """Read the source alone."""
        resolve_name("sdxl.imports.convert:read_experiment")(self.source)
        return NOTHING


AnyJob = Annotated[
    Check | Manifest | CollectVocabulary | Pack
    | Duplicates | Filter | Copy | ApplyCorrections | Cache | Machine | Import | Labels,
    Field(discriminator="name"),
]  # fmt: skip
