"""How far predicted numbers are from the true ones."""

import numpy as np
from numpy import ndarray
from scipy.stats import spearmanr

from utils.contracts import Figures
from utils.record.figures import MARGINS

_BLOCKS = 100  # of groups, for the intervals


def measure_numbers(pairs: ndarray, groups: ndarray) -> Figures:
    """Return mae, rmse, r2, rank_correlation (Spearman's), half of their 95 % intervals, and `samples`.

    pairs: predicted and true numbers, [N, 2]; groups: [N]. r2: always answering the mean gets 0. The intervals are
    those of a jackknife that leaves out whole groups, in blocks.
    """
    blocks = np.unique(groups, return_inverse=True)[1] % _BLOCKS
    others = [[*_measure(pairs[blocks != block]).values()] for block in np.unique(blocks)]
    margins = 1.96 * np.sqrt((len(others) - 1) * np.var(others, axis=0))
    return _measure(pairs) | dict(zip(MARGINS, margins.tolist())) | {"samples": len(pairs)}


def _measure(pairs: ndarray) -> Figures:
    error = np.abs(pairs[:, 0] - pairs[:, 1])
    squared = (error**2).mean()
    figures = {"mae": error.mean(), "rmse": squared**0.5, "r2": 1 - squared / pairs[:, 1].var()}
    return figures | {"rank_correlation": spearmanr(*pairs.T).statistic}
