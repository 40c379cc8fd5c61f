"""Fine-tuning with three skipped steps, for the tests of what a skipped step changes on each rank.

The fourth step's losses are NaN on the last rank alone. In the sixth all losses are finite, and a single element of the
head's gradient is NaN, in a row that one rank holds where the ranks share rows. In the eighth no image weighs anything.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import engine.learner as loop
import finetune
from engine.tasks.classification import ClassificationTask
from utils.ranks import distributed

_forward, _train_step = ClassificationTask.forward, loop.train_step
_now = {"step": -1}


def forward(self, batch, progress):
    output = _forward(self, batch, progress)
    if self.training and _now["step"] == 3 and distributed.rank() == distributed.world_size() - 1:
        output.loss = output.loss * torch.nan
    if self.training and _now["step"] == 5:
        output.loss = output.loss + (self.network.head.weight[-1, 0] * 0.0).sqrt()  # 0, of slope 0 / 0
    return output


def train_step(learner, batches, *arguments, **named):
    _now["step"] = learner.step
    if learner.step == 7:
        for batch in batches:
            batch["weight"].zero_()
    return _train_step(learner, batches, *arguments, **named)


ClassificationTask.forward, loop.train_step = forward, train_step

if __name__ == "__main__":
    finetune.main()
