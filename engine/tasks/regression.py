"""Regression: a number per image, such as a score or an age."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from data.collection.choose import training_rows
from data.collection.collection import Collection
from data.collection.split import lead_rows
from data.layouts.table import TARGET
from data.stream.loader import Fields
from engine.measures.numbers import measure_numbers
from engine.measures.probe import gather_features
from engine.task import Loaders, Report, StepOutput
from engine.tasks.classification import ClassificationKind
from engine.tasks.config import ImageTrainingConfig
from engine.tasks.kind import ImageTask, Setup, label_fields
from models.image_model import find_head
from optim.ridge import Ridge
from utils.contracts import Batch
from utils.io.files import Json


class RegressionTask(ImageTask):
    """Own a network that gives a number in its unit. `facts["target_scale"]`: mean and standard deviation in training.

    A head learns numbers of mean 0 and deviation 1 in a few steps, others hardly: a hook of the head gives the unit.
    """

    best_metric = "r2"
    best_is_lowest = False
    head = "refitted"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, outputs=1)
        self.mean, self.deviation = setup.facts["target_scale"]
        find_head(self.network).register_forward_hook(lambda *call: call[2].float() * self.deviation + self.mean)

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's smooth L1 loss, in standard deviations."""
        losses = F.smooth_l1_loss(self.predict(batch), batch["labels"], reduction="none", beta=self.deviation)
        return StepOutput(losses[:, 0] / self.deviation)

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Measure all samples of `val` (measures/numbers.py)."""
        pairs = ((self.predict(batch), batch) for batch in loaders["val"])
        predicted, numbers, groups = map(Tensor.numpy, gather_features(pairs, ("labels", "group")))
        return Report(measure_numbers(np.hstack([predicted, numbers]), groups))

    def fit(self, features: Tensor, labels: Tensor, outputs: int, again: bool) -> tuple[Tensor, ...]:
        """Return a head for standardised features [N, C]: weight, bias, leave-one-out loss and R2."""
        ridge = Ridge(features, (labels - self.mean) / self.deviation)
        errors = ridge.compare(lambda numbers, predicted: (numbers - predicted).square().sum() / len(labels))
        penalty = min(errors, key=errors.__getitem__)
        return *ridge.solve(penalty), errors[penalty], 1 - errors[penalty]


class RegressionKind(ClassificationKind):
    """Images with a number, the column TARGET of the index."""

    task = RegressionTask
    names = ("target_scale",)
    output = "number"

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> Json:
        """Return the mean and the standard deviation of the training images."""
        numbers = collection.column(TARGET)
        numbers = numbers[training_rows(collection, config.loop, ~np.isnan(numbers))]
        return {"target_scale": [numbers.mean(), numbers.std() or 1.0]}

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return the rows with a number, and a function that adds the number [1] and the group of a sample."""
        numbers = collection.column(TARGET)
        return ~np.isnan(numbers), label_fields(labels=np.float32(numbers)[:, None], group=lead_rows(collection.table))
