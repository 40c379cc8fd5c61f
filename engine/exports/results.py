"""What evaluate.py has measured of weights: a run's own splits and other images, each in a file of its own."""

from contextlib import suppress
from pathlib import Path

from utils.io.files import read_json

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
                results[str(found["measured"])] = {
                    name: value
                    for name, value in found.items()
                    if isinstance(value, int | float) and name not in _NO_FIGURES
                }
    return results
