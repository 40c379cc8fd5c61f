"""The exports of task=diffusion."""

from collections.abc import Mapping

from engine.tasks.kind import Export

DIFFUSION_EXPORTS: Mapping[str, Export] = {}
