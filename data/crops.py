"""Crops: images of which one shows a part of the other, resized, recompressed or mirrored; or has bars around it.

    wholes, parts = find_crops(thumbnails)     rows [n], [n]: thumbnails[parts] look like windows of thumbnails[wholes]

A window leaves out up to a fifth of each side, in steps of a twentieth: 225 windows of an image. Its hash has a bit for
the sign of each of the 8 x 8 lowest frequencies (data/duplicates.py). A part and a window are compared where the signs
of the 5 x 5 lowest are equal, but for the 6 of which the part is least sure. They are candidates if they differ in at
most 2 of the 32 signs of which the part is surest, and in 14 of all. A candidate counts if the slopes of the grey
levels correlate after the window was fitted to the part by least squares.
Source: Lucas and Kanade 1981, An iterative image registration technique (the fit).
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data.duplicates import SIDE_PX, is_near
from utils.ranks.processes import count_cores

_STEP, _CUTS = 1 / 20, 4  # of a side; most steps that are cut off it
_BOUNDS = np.array([(i * _STEP, 1 - j * _STEP) for i in range(_CUTS + 1) for j in range(_CUTS + 1 - i)], np.float32)
_WINDOWS = len(_BOUNDS) ** 2  # of an image; the first is the whole
_FREQUENCIES, _KEY_FREQUENCIES = 8, 5
_DULL = 2**24  # follows the keys of 5 x 5 - 1 bits
_ODD = np.uint64(0xAAAAAAAAAAAAAAAA)  # the bits of the odd horizontal frequencies, whose signs a mirror changes
_UNSURE, _SURE = 6, 32  # bits
_SURE_DISTANCE, _DISTANCE = 2, 14  # bits that may differ, of the surest and of all
_COMMON = 1024  # windows of one key; more are not compared: plain pictures, for which all would be candidates
_CONTRAST = 6.0  # standard deviation of the grey levels; below, compression decides the signs
_STAGES = (0, 0.5), (4, 0.85)  # steps of the fit, and the correlation that a candidate needs after them
_CHUNK = 256  # thumbnails
_LIMITS = np.array([[0, 0.7], [0.3, 1]], np.float32)  # of a window's bounds, least and most
_PLACES = (np.arange(SIDE_PX, dtype=np.float32) + 0.5) / SIDE_PX
_BLUR = sum(np.eye(SIDE_PX, k=k, dtype=np.float32) * (0.5 if k == 0 else 0.25) for k in (-1, 0, 1))
_SUBSETS = np.arange(2**_UNSURE)[:, None] >> np.arange(_UNSURE) & 1


class _Signs(NamedTuple):
    """Of thumbnails: hashes and keys [n, 225] of their windows, masks [n] of the surest bits, flips [n, 64] of keys.

    keys: the signs of the 5 x 5 lowest frequencies, without the mean; _DULL where there is too little contrast.
    """

    hashes: np.ndarray
    keys: np.ndarray
    sure: np.ndarray
    flips: np.ndarray


class _Index(NamedTuple):
    """The windows of all images by their keys: those of key k are at starts[k] to starts[k + 1]."""

    starts: np.ndarray
    windows: np.ndarray
    hashes: np.ndarray


def find_crops(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of images, and of those that show a part of each, [n] and [n].

    thumbnails: grey levels of the whole images, squeezed to squares, uint8 [N, 32, 32].
    """
    chunks = [np.arange(at, min(at + _CHUNK, len(thumbnails))) for at in range(0, len(thumbnails), _CHUNK)]
    if not chunks:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    with ThreadPoolExecutor(count_cores()) as pool:
        signs = list(pool.map(lambda rows: _find_signs(thumbnails[rows].astype(np.float32)), chunks))
        index = _index_windows(signs)
        found = list(pool.map(functools.partial(_find_in_chunk, thumbnails, index), chunks, signs))
    return tuple(np.concatenate(rows) for rows in zip(*found))


def _find_signs(levels: np.ndarray) -> _Signs:
    count, waves = len(levels), _window_waves()
    found = (waves @ levels @ waves.T).reshape(count, len(_BOUNDS), _FREQUENCIES, len(_BOUNDS), _FREQUENCIES)
    found = found.transpose(0, 1, 3, 2, 4).reshape(count, _WINDOWS, _FREQUENCIES**2)
    found[..., 0] = 0  # the mean
    hashes = np.packbits(found > 0.5, axis=-1, bitorder="little").view("<u8")[..., 0]
    strengths = np.abs(found[:, 0])
    surest = np.argpartition(-strengths, _SURE, axis=1)[:, :_SURE]
    sure = np.bitwise_or.reduce(np.uint64(1) << surest.astype(np.uint64), axis=1)
    key_places = np.arange(_FREQUENCIES**2).reshape(_FREQUENCIES, -1)[:_KEY_FREQUENCIES, :_KEY_FREQUENCIES].flat[1:]
    unsure = np.argpartition(strengths[:, key_places], _UNSURE, axis=1)[:, :_UNSURE]
    is_clear = levels.std(axis=(1, 2)) >= _CONTRAST
    return _Signs(hashes, np.where(is_clear[:, None], _keys(hashes), _DULL), sure, (1 << unsure) @ _SUBSETS.T)


def _keys(hashes: np.ndarray) -> np.ndarray:
    mask = np.uint64(2**_KEY_FREQUENCIES - 1)
    rows = [(hashes >> np.uint64(8 * row) & mask) << np.uint64(5 * row) for row in range(_KEY_FREQUENCIES)]
    return (sum(rows) >> np.uint64(1)).astype(np.int32)


def _index_windows(signs: list[_Signs]) -> _Index:
    keys = np.concatenate([part.keys for part in signs]).reshape(-1)
    order = np.argsort(keys).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=_DULL + 1))])
    return _Index(starts, order, np.concatenate([part.hashes for part in signs]).reshape(-1)[order])


def _find_in_chunk(
    thumbnails: np.ndarray, index: _Index, rows: np.ndarray, signs: _Signs
) -> tuple[np.ndarray, np.ndarray]:
    """Return the wholes of which the images of some rows are parts, and these rows."""
    wholes, parts = [], []
    for mirrored in (False, True):
        windows, places = _find_candidates(index, signs, _ODD if mirrored else np.uint64(0), rows)
        for at in range(0, len(windows), _CHUNK):
            some, shown = windows[at : at + _CHUNK], rows[places[at : at + _CHUNK]]
            whole = some // _WINDOWS
            levels = thumbnails[shown][:, :, ::-1] if mirrored else thumbnails[shown]
            for steps, least in _STAGES:
                alike = _correlate(thumbnails[whole], levels, some % _WINDOWS, steps) >= least
                whole, shown, levels, some = whole[alike], shown[alike], levels[alike], some[alike]
            wholes.append(whole)
            parts.append(shown)
    return np.concatenate([rows[:0], *wholes]), np.concatenate([rows[:0], *parts])


def _find_candidates(
    index: _Index, signs: _Signs, mirror: np.uint64, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the window that is nearest, of each image that may have one, to each image of some rows, and its place."""
    hashes = signs.hashes[:, 0] ^ mirror
    clear = np.flatnonzero(signs.keys[:, 0] != _DULL)
    keys = (_keys(hashes[clear])[:, None] ^ signs.flips[clear]).reshape(-1)
    first = index.starts[keys]
    counts = index.starts[keys + 1] - first
    counts[counts > _COMMON] = 0
    at = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
    places = np.repeat(np.repeat(clear, len(_SUBSETS)), counts)
    near = np.flatnonzero(is_near((index.hashes[at] ^ hashes[places]) & signs.sure[places], _SURE_DISTANCE))
    differences = (index.hashes[at[near]] ^ hashes[places[near]])[:, None].view(np.uint8)
    distances = np.unpackbits(differences, axis=1).sum(axis=1)
    order = np.argsort(distances, kind="stable")
    near = near[order[distances[order] <= _DISTANCE]]
    windows, places = index.windows[at[near]], places[near]
    _, nearest = np.unique(windows // _WINDOWS + places * len(index.windows), return_index=True)
    nearest = nearest[windows[nearest] // _WINDOWS != rows[places[nearest]]]
    return windows[nearest], places[nearest]


def _correlate(wholes: np.ndarray, parts: np.ndarray, windows: np.ndarray, steps: int) -> np.ndarray:
    """Return the correlation [n] of the slopes of parts and of windows of wholes, levels [n, 32, 32], once fitted."""
    wholes, parts = wholes.astype(np.float32), _standardise(parts.astype(np.float32))
    bounds = np.stack([_BOUNDS[windows // len(_BOUNDS)], _BOUNDS[windows % len(_BOUNDS)]], axis=1)  # [n, y and x, 2]
    ends = np.stack([1 - _PLACES, _PLACES])  # how far a place moves with each bound
    for step in range(steps + 1):
        rows, columns = _sample(bounds[:, 0]), _sample(bounds[:, 1])
        shown = _standardise(rows @ wholes @ columns.transpose(0, 2, 1))
        down, right = np.gradient(shown, axis=(1, 2))
        if step < steps:
            sides = SIDE_PX / (bounds[..., 1] - bounds[..., 0])[..., None, None, None]
            moves = np.concatenate(
                [down[:, None] * ends[:, :, None] * sides[:, 0], right[:, None] * ends[:, None] * sides[:, 1]], axis=1
            ).reshape(-1, 4, SIDE_PX**2)
            square = moves @ moves.transpose(0, 2, 1) + 4e-3 * np.eye(4, dtype=np.float32)
            change = np.linalg.solve(square, moves @ (parts - shown).reshape(-1, SIDE_PX**2, 1))
            bounds = (bounds + change.reshape(-1, 2, 2).clip(-0.05, 0.05)).clip(*_LIMITS)
    ours, theirs = np.stack([down, right], axis=1), np.stack(np.gradient(parts, axis=(1, 2)), axis=1)
    dot = functools.partial(np.einsum, "nkyx,nkyx->n")
    return dot(ours, theirs) / np.sqrt(dot(ours, ours) * dot(theirs, theirs)).clip(1e-6)


def _sample(bounds: np.ndarray) -> np.ndarray:
    """Return the weights that sample 32 places between bounds [n, 2], of a side's 32 pixels, linearly: [n, 32, 32]."""
    places = bounds[:, :1] + (bounds[:, 1:] - bounds[:, :1]) * _PLACES
    places = (places * SIDE_PX - 0.5).clip(0, SIDE_PX - 1)
    return np.maximum(1 - np.abs(places[..., None] - np.arange(SIDE_PX, dtype=np.float32)), 0).astype(np.float32)


def _standardise(levels: np.ndarray) -> np.ndarray:
    """Blur levels [n, 32, 32], and scale them to mean 0 and norm 1."""
    blurred = _BLUR @ levels @ _BLUR
    blurred -= blurred.mean(axis=(1, 2), keepdims=True)
    return blurred / np.sqrt(np.square(blurred).sum(axis=(1, 2), keepdims=True)).clip(1e-6)


@functools.cache
def _window_waves() -> np.ndarray:
    """Return the waves of the lowest frequencies in each interval of a side, float32 [15 * 8, 32]."""
    waves = np.cos(np.pi * np.outer(np.arange(_FREQUENCIES), _PLACES)).astype(np.float32)
    return (waves @ _sample(_BOUNDS)).reshape(-1, SIDE_PX)
