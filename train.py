r"""Train a classifier: find the learning rate, then train one cycle, with live plots.

    python train.py                                                       the embedded glyphs
    python train.py data.root=PATH                      class folders, with or without train/ and val/
    python train.py model.name=convnext_atto optim=adamw data.root=PATH
    python train.py --multirun optim.lr=0.1,0.4 sweep.name=rates       a sweep
    torchrun --nproc_per_node=8 train.py data.root=PATH

The same command resumes a run. finetune.py has the defaults for initial weights (init_from).
"""

from utils.start import begin

begin(__doc__)

from engine.tasks.kinds import training_command

main = training_command("train")

if __name__ == "__main__":
    main()
