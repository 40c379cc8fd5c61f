r"""Fine-tune a network for classification or tagging, from a run or weight file, or from scratch (init_from=null).

    python finetune.py init_from=outputs/pretrain_fcmae/RUN                              the embedded glyphs
    python finetune.py model=timm model.name=convnextv2_tiny.fcmae_ft_in22k_in1k init_from=timm \
        data.root=PATH
    python finetune.py data.root=PATH init_from=RUN dry_run=true       check and print the plan
    python finetune.py init_from=FILE task.head=kept loop.total_steps=0 data.root=PATH
                                                                                         evaluate FILE, save it as a run
    python finetune.py --multirun optim.lr=0.001,0.003 seed=0,1,2 sweep.name=rates       a sweep, ranked at the end
    torchrun --nproc_per_node=8 finetune.py model=convnextv2_base data.root=PATH init_from=RUN

The same command resumes a run.
"""

from utils.start import begin

begin(__doc__)

from engine.tasks.kinds import training_command

main = training_command("finetune")

if __name__ == "__main__":
    main()
