r"""Fine-tune SDXL on captioned images: a LoRA, or the whole U-Net.

    python finetune_sdxl.py model.path=sd_xl_base_1.0.safetensors data.root=PATH task.noise.convert=true
    python finetune_sdxl.py model.path=FOLDER data.root=PATH task.lora.rank=32 'task.samples.prompts=["a cat"]'
    python finetune_sdxl.py model.path=FOLDER data.root=PATH task.lora=null optim.lr=1e-5   trains the whole U-Net
    python finetune_sdxl.py model.path=FOLDER data.root=PATH dry_run=true                   checks all, prints the plan
    torchrun --nproc_per_node=8 finetune_sdxl.py model.path=FOLDER data.root=PATH loop.global_batch_size=32

Captions are the collection's: .txt files beside the images, a manifest, or what predict.py output=beside writes. Images
keep their proportions in buckets of about one area; latents are cached. The same command resumes. `make install-sdxl`
installs what it needs; docs/sdxl.md goes from a folder of images to a file that ComfyUI loads.
"""

import utils.config.help  # noqa: F401, I001 (answers --help before the slow imports)

from typing import Self

from pydantic import model_validator

from data.config import DataConfig
from engine.config import TrainingConfig
from engine.tasks.kinds import task_schema, train
from models.sdxl.networks import SDXLConfig
from utils.config.entry_point import entry_point


class FinetuneSDXLConfig(TrainingConfig):
    """conf/finetune_sdxl.yaml, checked."""

    model: SDXLConfig
    data: DataConfig
    task: task_schema("finetune_sdxl")

    @model_validator(mode="after")
    def _suits_the_task(self) -> Self:
        self.task.check_run(self)
        return self


main = entry_point("finetune_sdxl", FinetuneSDXLConfig)(train)

if __name__ == "__main__":
    main()
