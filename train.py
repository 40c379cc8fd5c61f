r"""Train a classifier or a tagger, by a plan for some minutes or by a recipe.

    python train.py data.root=PATH loop.minutes=10 run_dir=outputs/mine                  class folders or a table
    python train.py task=tagging data.root=PATH loop.minutes=10 run_dir=outputs/tags     a tagger
    python train.py data.root=PATH loop.minutes=10 dry_run=true       check the data and the settings, without training

    python train.py                                                   the embedded glyphs, by conf/train.yaml
    python train.py model.name=convnext_atto optim=adamw data.root=PATH
    python train.py --multirun optim.lr=0.1,0.4 sweep.name=rates       a sweep
    torchrun --nproc_per_node=8 train.py data.root=PATH

With loop.minutes the program measures machine and images, chooses network, image size, augmentation and rate, and says
why. The same command resumes a run. finetune.py has the defaults for initial weights (init_from).
"""

from utils.start import begin

begin(__doc__)

from engine.tasks.kinds import training_command

main = training_command("train")

if __name__ == "__main__":
    main()
