"""Documents of use, told from others by a linear model: logistic regression on hashed words and pairs of
words (fastText, Joulin et al. 2016). The threshold keeps the share of the useful that is asked for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import files, prepare
from verify import wilson

BITS, LONGEST_WORD = 20, 32  # 2^20 weights; longer words, in bytes, are addresses and rulers
EPOCHS, RATE = 20, 0.5  # of training; the rate falls to 0
_ODD, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # to multiply hashes with
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # of eight, as one number
# There are too many numbers to learn each: of a digit it counts whether it is 0. A byte 0 ends a text.
_BYTES = bytes(32 if i == 0 else ord("1") if chr(i) in "123456789" else i for i in range(256))
# 0 stands between words, letters and digits make words, every other mark is one
_KIND = np.array([1 if i > 127 or chr(i).isalpha() else 2 if 48 <= i < 58 else 3 if i > 32 or i == 0 else 0
                  for i in range(256)], np.uint8)


def hashed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buckets of all words (w,), of the pairs of each and the next (w,), where texts begin and end (n + 1,).
    Before the first word stands an empty one. A word is known by length, first and last eight bytes."""
    blobs = [text.lower().encode("utf-8", "replace").translate(_BYTES) for text in texts]
    raw = b"\0" + b"\0".join(blobs) + bytes(9)
    data, eight = np.frombuffer(raw, np.uint8), np.ndarray(len(raw) - 7, np.uint64, raw, strides=1)
    kind = _KIND[data]
    edges = np.flatnonzero((kind[1:] != kind[:-1]) | (kind[1:] == 3)) + 1
    edges = np.concatenate(([0], edges[:-7]))  # of the nine bytes 0, the first is the last word
    first, length = edges[:-1], np.diff(edges)
    words = (kind[first] > 0) & (length <= LONGEST_WORD)
    first, length = first[words], length[words]
    head = eight[first] & _FIRST_BYTES[np.minimum(length, 8)]
    tail = eight[np.maximum(first + length - 8, 0)]
    word = (head * _ODD) ^ ((np.where(length > 8, tail, 0) + length.astype(np.uint64)) * _OTHER)
    word = (word ^ (word >> np.uint64(29))) * _OTHER
    pair, shift = (word[:-1] * _ODD + word[1:]) * _OTHER, np.uint64(64 - BITS)
    return (word[:-1] >> shift).astype(int), (pair >> shift).astype(int), np.flatnonzero(data[first] == 0)


def scores(model: dict, texts: Sequence[str]) -> np.ndarray:
    """bias + the sum of the weights of a text's n words and n pairs / sqrt(2 n): (texts,) fp64"""
    found = [np.zeros(0)]
    for some in filter(None, prepare.in_chunks(texts)):
        word, pair, begin = hashed(some)
        sums = np.add.reduceat(model["weights"][word] + model["weights"][pair], begin[:-1])
        found.append(sums / np.sqrt(2 * np.diff(begin)) + model["bias"])
    return np.concatenate(found)


def fit(texts: Sequence[str], useful: np.ndarray) -> dict:
    """Gradient descent on the log-loss, a text at a time → {"weights": (2^BITS,) fp32, "bias": float}."""
    weights, bias, rng, rate, rows = np.zeros(1 << BITS, np.float32), 0.0, np.random.default_rng(0), RATE, []
    for text in tqdm(texts, desc="labels", disable=None):
        bucket, count = np.unique(np.concatenate((pair := hashed([text]))[:2]), return_counts=True)
        rows.append((bucket.astype(np.int32), np.float32(count / math.sqrt(2 * len(pair[0])))))
    for _ in tqdm(range(EPOCHS), desc="training", disable=None):
        for i in rng.permutation(len(rows)):
            bucket, x = rows[i]
            error = 1 / (1 + math.exp(-max(-50.0, weights[bucket] @ x + bias))) - useful[i]
            weights[bucket] -= np.float32(rate * error) * x
            bias -= 0.1 * rate * error
            rate -= RATE / EPOCHS / len(rows)
    return {"weights": weights, "bias": bias}


def threshold_for(points: np.ndarray, recall: float) -> float:
    """The highest threshold that keeps at least this share of the points."""
    return float(np.sort(points)[::-1][max(1, math.ceil(recall * len(points) - 1e-9)) - 1])


def train(texts: list[str], useful: np.ndarray, recall: float, out: Path) -> None:
    """Fit three fifths of the labels, choose the threshold on one, measure on the last; write all of it."""
    order = np.random.default_rng(0).permutation(len(texts))
    order = order[np.argsort(useful[order], kind="stable")]  # so that a fifth has a fifth of each kind
    fifths = [[texts[i] for i in order[n::5]] for n in range(5)]
    (chosen, of_use), (test, right) = ((fifths[n], useful[order[n::5]]) for n in (0, 1))
    model = fit(sum(fifths[2:], []), np.concatenate([useful[order[n::5]] for n in (2, 3, 4)]))
    model["threshold"] = threshold_for(scores(model, chosen)[of_use], recall)
    points = scores(model, test)
    kept, measured = points >= model["threshold"], {"labels": len(texts), "of_use": int(useful.sum())}
    hits = int((kept & right).sum())
    for name, n in ("precision", int(kept.sum())), ("recall", int(right.sum())):
        measured[name] = [hits / max(n, 1), *wilson(hits, n)]  # and 95 % interval
    draw_curve(points, right, measured, out / "curve.png")
    with files.atomic_write(out / "classifier.npz", "wb") as file:
        np.savez_compressed(file, **model, measured=json.dumps(measured | {"measured_on": len(points)}))


def draw_curve(points: np.ndarray, right: np.ndarray, measured: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    hits, kept = np.cumsum(right[np.argsort(-points, kind="stable")]), np.arange(1, len(points) + 1)
    axes = (figure := Figure((5, 4), layout="constrained")).subplots()
    axes.plot(hits / hits[-1], hits / kept, label="other thresholds")
    (x, *across), (y, *along) = measured["recall"], measured["precision"]
    axes.plot([*across, np.nan, x, x], [y, y, np.nan, *along], "k", label="chosen, 95 % intervals")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(loc="lower left")
    with files.atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)
