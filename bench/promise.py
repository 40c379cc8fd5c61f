"""How often the promise of evaluate.py risk=0.05 is kept, beside what people do: the lowest threshold that met it.

    python bench/promise.py FOLDER

FOLDER has a file NAME.npz for each collection: features f [N, C] and labels l [N]. A logistic regression on 30 % of a
collection answers the others, which are the truth. From these, calibrations of 200 to 2,000 images are drawn. `chosen`:
one of ten such heads (of other penalties) that is best on the calibration's own images, as a run's best weights are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn import functional as F

from engine.measures.promise import find_edge
from engine.measures.tags import BINS, edge_below
from utils.errors import UserError

RISK = 0.05
SIZES = (200, 500, 1000, 2000)
PENALTIES = np.geomspace(1e-4, 1e-1, 10)


def fit(features, labels, trained, penalty):
    """Return the function from features to logits of a logistic regression on some images."""
    mean = features[trained].mean(0)
    scale = features[trained].std(0) + 1e-6
    x = (features[trained] - mean) / scale
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight.T, labels[trained]) + penalty * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return lambda others: (others - mean) / scale @ weight.detach().T


def answer(logits, labels):
    """Return twice the bin of each image's answer, plus whether it is right."""
    prob, first = logits.softmax(1).max(1)
    return 2 * edge_below(prob.double().logit().numpy()) + (first == labels).numpy()


def tails(cells):
    """Return wrong and right answers of at least each edge."""
    return np.bincount(cells, minlength=2 * BINS).reshape(BINS, 2)[::-1].cumsum(0)[::-1].T


def take_lowest(wrong, right, risk):
    """Return the edge of the lowest threshold whose share met the risk."""
    return np.flatnonzero((wrong + right > 0) & (wrong <= risk * (wrong + right)))[0]


def measure(heads, rule, draw, size):
    """Return whether a calibration made a promise, and whether this was broken. The best of several heads is taken."""
    images = draw.integers(0, len(heads[0]), size)
    head = max(heads, key=lambda cells: (cells[images] % 2).sum())
    wrong, right = tails(head)
    try:
        edge = rule(*tails(head[images]), RISK)
    except (UserError, IndexError):
        return False, False
    return True, wrong[edge] > RISK * (wrong + right)[edge]


def read_all(folder):
    """Yield name, features, labels and how many of them are trained on, of each collection."""
    for file in sorted(Path(folder).rglob("*.npz")):
        data = np.load(file)
        if "l" in data and len(data["l"]) >= 500:
            order = torch.randperm(len(data["l"]), generator=torch.Generator().manual_seed(0))[:12000]
            labels = torch.from_numpy(data["l"].astype(np.int64))[order]
            yield file.stem, torch.from_numpy(data["f"])[order].float(), labels, len(order) * 3 // 10


def compare_rules(folder, draws):
    """Print a line for each collection and rule, and their sums."""
    sums = {}
    for stem, features, labels, count in read_all(folder):
        trained = torch.arange(count)
        heads = [fit(features, labels, trained, penalty)(features[count:]) for penalty in PENALTIES]
        heads = [answer(logits, labels[count:]) for logits in heads]
        for name, rule, known in (
            ("ours", find_edge, heads[5:6]), ("lowest", take_lowest, heads[5:6]), ("ours, chosen", find_edge, heads)
        ):  # fmt: skip
            draw = np.random.default_rng(0)
            found = np.array([measure(known, rule, draw, size) for size in SIZES for _ in range(draws)])
            sums[name] = sums.get(name, 0) + np.r_[len(found), found.sum(0)]
            accuracy = (known[0] % 2).mean()
            print(f"{stem:10} top-1 {accuracy:.3f}  {name:12} made, broken {found.sum(0)} of {len(found)}", flush=True)
    for name, (count, made, broken) in sums.items():
        print(f"{name:12}  {count} resamples: {made} promises, {broken} broken ({broken / made:.3f})")


if __name__ == "__main__":
    compare_rules(sys.argv[1], 50)
