r"""Fine-tune the decoder of SDXL's VAE on images; latents, caches of them and U-Nets stay valid.

    python finetune_vae.py model.path=sd_xl_base_1.0.safetensors data.root=PATH
    python finetune_vae.py model.path=FOLDER data.root=PATH task.perceptual.network=vgg16.tv_in1k
    python finetune_vae.py model.path=FOLDER data.root=PATH task.discriminator.start_step=2000 \
        task.discriminator.weight=0.5                                                   two players
    python finetune_vae.py model.path=FOLDER data.root=PATH dry_run=true                check and print the plan

Training sees random crops of the images in their buckets, evaluation whole images. The same command resumes a run.
`make install-sdxl` installs the requirements. docs/sdxl.md describes the losses and the exports.
"""

from utils.start import begin

begin(__doc__)

from engine.tasks.kinds import training_command

main = training_command("finetune_vae")

if __name__ == "__main__":
    main()
