"""Run one offline job on a collection. conf/job/ has the keys of each job (docs/collections.md).

    python prepare.py job=check data.root=PATH             what the folder has and what is wrong with it, on a page
    python prepare.py job=manifest data.root=PATH          check all images, write manifest.parquet
    python prepare.py job=manifest data.root=PATH job.verify=false          without decoding them
    python prepare.py job=labels data.root=PATH            the labels that are probably wrong
    python prepare.py job=vocabulary data.root=PATH job.output=FILE         the tags to train
    python prepare.py job=pack data.root=PATH job.output=FOLDER             the images as tar shards
    python prepare.py job=cache data.root=PATH data.cache.disk_gib=100 job.fill=true    decoded, before a training

Other jobs: duplicates, filter, downsample, copy, apply_corrections, cache, machine, import. No
job changes an image.
"""

from utils.start import begin

begin(__doc__)

from typing import Annotated

from pydantic import Field

from data.config import WholeData
from data.tools.apply_corrections import ApplyCorrections
from data.tools.cache import Cache
from data.tools.check import Check
from data.tools.copy import Copy
from data.tools.duplicates import Duplicates
from data.tools.exclude import Filter
from data.tools.machine import Machine
from data.tools.manifest import Manifest
from data.tools.pack import Pack
from data.tools.vocabulary import CollectVocabulary
from engine.frozen.labels_job import Labels
from sdxl.import_sd_scripts import Import
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict

AnyJob = Annotated[
    Check | Manifest | CollectVocabulary | Pack
    | Duplicates | Filter | Copy | ApplyCorrections | Cache | Machine | Import | Labels,
    Field(discriminator="name"),
]  # fmt: skip


class PrepareConfig(Strict):
    """The job and the collection. dry_run: only check the configuration."""

    job: AnyJob
    data: WholeData
    dry_run: bool


@entry_point("prepare", PrepareConfig)
def main(config: PrepareConfig, job: Job) -> str:
    """Run the job."""
    return config.job.check(config.data) if config.dry_run else config.job.run(config.data)


if __name__ == "__main__":
    main()
