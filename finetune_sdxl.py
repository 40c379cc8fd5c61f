r"""Fine-tune SDXL on captioned images: a LoRA, or the whole U-Net.

    python finetune_sdxl.py model.path=sd_xl_base_1.0.safetensors data.root=PATH
    python finetune_sdxl.py model.path=FOLDER data.root=PATH task.lora.rank=32 'task.samples.prompts=["a cat"]'
    python finetune_sdxl.py model.path=FOLDER data.root=PATH task.lora=null optim.lr=1e-5   train the whole U-Net
    python finetune_sdxl.py model.path=FOLDER data.root=PATH init_from=RUN                  continue its LoRA or U-Net
    python finetune_sdxl.py model.path=FOLDER data.root=PATH dry_run=true                   check and print the plan
    torchrun --nproc_per_node=8 finetune_sdxl.py model.path=FOLDER data.root=PATH loop.batch_size=32

Captions come from .txt files beside the images (predict.py output=beside writes them) or from a manifest. Buckets of
about equal area keep the images' proportions; latents are cached. The same command resumes a run. `make install-sdxl`
installs the requirements. docs/sdxl.md leads from a folder of images to a file for ComfyUI.
"""

from utils.start import begin

begin(__doc__)

from engine.tasks.kinds import training_command

main = training_command("finetune_sdxl")

if __name__ == "__main__":
    main()
