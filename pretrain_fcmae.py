r"""Pretrain a ConvNeXt V2 with FCMAE, without labels.

    python pretrain_fcmae.py                                                         the embedded glyphs
    python pretrain_fcmae.py experiment=glyphs/demo_pretrain run_dir=outputs/tried   a recipe
    python pretrain_fcmae.py model=convnextv2_tiny data.root=PATH loop.total_epochs=100
    python pretrain_fcmae.py model=convnextv2_base runtime.device=cpu dry_run=true   check and print the plan
    torchrun --nproc_per_node=8 pretrain_fcmae.py model=convnextv2_base data.root=PATH

All images of the training split are used, labelled or not. The same command resumes a run.
"""

from utils.start import begin

begin(__doc__)

from engine.tasks.kinds import training_command

main = training_command("pretrain_fcmae")

if __name__ == "__main__":
    main()
