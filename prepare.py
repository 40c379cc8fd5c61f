"""Run one offline job on a collection. conf/job/ has the keys of each job (docs/collections.md).

    python prepare.py job=check data.root=PATH             what the folder has and what is wrong with it, on a page
    python prepare.py job=manifest data.root=PATH          check all images, write manifest.parquet
    python prepare.py job=manifest data.root=PATH job.verify=false          without decoding them
    python prepare.py job=labels data.root=PATH            the labels that are probably wrong
    python prepare.py job=vocabulary data.root=PATH job.output=FILE         the tags to train
    python prepare.py job=pack data.root=PATH job.output=FOLDER             the images as tar shards
    python prepare.py job=cache data.root=PATH data.cache.disk_gib=100 job.fill=true    decoded, before a training

--help lists all jobs. No job changes an image.
"""

from utils.start import begin

begin(__doc__)

from data.config import WholeData
from data.tools.config import AnyJob
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict


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
