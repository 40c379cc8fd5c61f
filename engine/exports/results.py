"""What evaluate.py has measured of weights: a run's own splits and other images, each in a file of its own."""

from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path

from utils.io.files import read_json
from utils.record.figures import show_figure, show_name

_NO_FIGURES = ("seconds", "step")


def read_results(folder: Path, weights_hash: str | None) -> dict[str, dict[str, float]]:
    """Return the figures of weights in a run's folder, by what was measured: `validation: 30 images`, `test: ...`.

    Images that were trained on are left out.
    """
    results = {}
    for file in [*sorted(folder.glob("metrics*.json")), *sorted(folder.glob("evaluate/*/metrics*.json"))]:
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = dict(read_json(file))
            if found["weights_hash"] == weights_hash and ("data" in found or found["split"] in ("val", "test")):
                kept = {
                    name: value
                    for name, value in found.items()
                    if isinstance(value, int | float) and name not in _NO_FIGURES and isfinite(value)
                }
                results[str(found["measured"])] = kept
    return results


def compare_results(results: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """Return a table of results: a column for each, by what was measured, and a row for each figure of the first."""
    rows = []
    for name in next(iter(results.values()), ()):
        shown = {measured: show_figure(name, figures) for measured, figures in results.items()}
        rows.append({"figure": show_name(name), **shown})
    return rows
