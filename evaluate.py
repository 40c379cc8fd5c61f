"""Evaluate weights on a collection's validation or test split, or other images, exactly on any number of ranks.

    python evaluate.py run_dir=RUN weights=best                       a run, on its own validation images
    python evaluate.py run_dir=RUN split=test                         on its test images
    python evaluate.py run_dir=RUN weights=last data.root=PATH        its last weights, on other images
    python evaluate.py weights=FILE data.root=PATH                    a weight file of ours, an ONNX file, a tagger
    python evaluate.py run_dir=RUN split=train per_image=true         a row for each training image
    python evaluate.py run_dir=RUN folds=5                            its recipe, by cross-validation
    python evaluate.py job=compare models=[RUN,FILE,FOLDER] data.root=PATH     taggers, ours and others'

Weights from elsewhere are evaluated as a run: finetune.py init_from=FILE task.head=kept loop.total_steps=0.

Writes metrics.json, report.html, tables/evaluate_*.csv and plots/evaluate_*.png into the run folder; other weights and
splits have names of their own: metrics_last_test.json and so on. Figures of other images are in
RUN/evaluate/WEIGHTS-FOLDER-HASH/, those of a file in outputs/evaluate/. per_image=true adds tables/images.parquet.
job=compare writes arena.json, report.html, tables and plots.
"""

from utils.start import begin

begin(__doc__)

from engine.judging.config import EvaluateConfig
from utils.config.entry_point import Command

main = Command("evaluate", "engine.judging.evaluate:run", EvaluateConfig)

if __name__ == "__main__":
    main()
