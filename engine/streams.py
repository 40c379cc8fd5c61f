"""The data of a run, as a script hands it to the engine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from utils.contracts import Batch, TrainStream


@dataclass(frozen=True)
class Streams:
    """Training and evaluation data.

    fingerprints: what must not change while a run is resumed, by configuration key, such as the collection's content.
    every_epochs: for evaluation loaders that not every evaluation needs (a probe), the epochs between two uses. The
        first evaluation at or after each multiple uses them, and so does that of the run's last step.
    described: lines of the first screen, such as `collection` and `images`.
    """

    train: TrainStream
    evaluation: Mapping[str, Iterable[Batch]]
    fingerprints: Mapping[str, str]
    every_epochs: Mapping[str, float] = field(default_factory=dict)
    described: Mapping[str, str] = field(default_factory=dict)

    @property
    def evaluation_samples(self) -> int:
        """Samples that every evaluation reads, of the loaders that say how many they have."""
        every = [loader for name, loader in self.evaluation.items() if name not in self.every_epochs]
        return sum(getattr(loader, "samples", 0) for loader in every)
