"""The share of some text that a head of K rows covers, for every K."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1_000
_QUANTILES = 0.025, 0.975
_DEVIATIONS = 1.959964  # of a normal distribution, within which 95% of it lies
_OCTAVES = 7  # doublings of K that a curve shows below the full vocabulary


@dataclass(frozen=True, slots=True)
class Point:
    """The coverage at one K.

    Attributes:
        rows: K.
        share: The share of the tokens that the head keeps.
        low: The lower end of the share's 95% interval: over documents by bootstrap where they are known, else
            Wilson's, which takes the tokens as independent and is too narrow; None where there is no interval.
        high: The upper end.
    """

    rows: int
    share: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """Coverage by K of one domain.

    Attributes:
        domain: The domain's name.
        origin: "calibration" for the calibration's held-out tokens, "text" for those of a text given with `--text`.
        tokens: The number of tokens.
        documents: The number of documents; None where they are not known.
        points: One for each K, ascending.
    """

    domain: str
    origin: Literal["calibration", "text"]
    tokens: int
    documents: int | None
    points: tuple[Point, ...]


def grid(kept: int, vocab_size: int) -> tuple[int, ...]:
    """Returns the values of K that a curve shows: powers of two, the export's own K, and the full vocabulary.

    Args:
        kept: The export's own K.
        vocab_size: The tokens of the full vocabulary.
    """
    powers = {1 << bit for bit in range(max(0, vocab_size.bit_length() - _OCTAVES), vocab_size.bit_length())}
    return tuple(sorted({each for each in powers if each < vocab_size} | {kept, vocab_size}))


def places(kept: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the place of each token in the order in which a growing K keeps tokens.

    Args:
        kept: int64[k], the ids that the exported head keeps. They come first, so that the curves are exact at its K.
        order: int64[vocabulary], all ids by the calibration's counts.

    Returns:
        int64[vocabulary].
    """
    is_kept = np.zeros(len(order), np.bool_)
    is_kept[kept] = True
    whole = np.concatenate([order[is_kept[order]], order[~is_kept[order]]])
    place = np.empty(len(order), np.int64)
    place[whole] = np.arange(len(order))
    return place


def curve_of_counts(domain: str, counts: NDArray[np.int64], place: NDArray[np.int64], rows: Sequence[int]) -> Curve:
    """Returns the coverage of counted tokens, whose documents are not known.

    Its intervals are Wilson's. The tokens of a document are alike, so that they are narrower than those over documents.

    Args:
        domain: The domain's name.
        counts: int64[vocabulary].
        place: int64[vocabulary], see `places`.
        rows: The values of K.
    """
    by_place = np.zeros_like(counts)
    by_place[place] = counts
    covered = np.concatenate([[0], np.cumsum(by_place)])
    total = int(counts.sum())
    points = tuple(Point(k, int(covered[k]) / max(1, total), *wilson(int(covered[k]), total)) for k in rows)
    return Curve(domain, "calibration", total, None, points)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share, of `hits` among `total` independent trials; 0 to 1 of none."""
    if not total:
        return 0.0, 1.0
    share, square = hits / total, _DEVIATIONS**2 / total
    middle = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def curve_of_documents(
    domain: str,
    origin: Literal["calibration", "text"],
    documents: Sequence[NDArray[np.int64]],
    place: NDArray[np.int64],
    rows: Sequence[int],
) -> Curve:
    """Returns the coverage of documents, with a bootstrap interval where there are several.

    Documents are resampled, not tokens: the tokens of one document are alike.

    Args:
        domain: The domain's name.
        origin: See `Curve`.
        documents: int64[·] token ids of each document.
        place: int64[vocabulary], see `places`.
        rows: The values of K.
    """
    filled = [place[document] for document in documents if len(document)]
    sizes = np.array([len(each) for each in filled])
    hits = np.array([np.searchsorted(np.sort(each), rows) for each in filled])  # [documents, rows]
    draws = np.random.default_rng(0).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), _RESAMPLES)
    shares = (draws @ hits) / (draws @ sizes)[:, None]
    lows, highs = np.quantile(shares, _QUANTILES, axis=0)
    whole = hits.sum(0) / sizes.sum()
    ends = [
        (float(low), float(high)) if len(sizes) > 1 else (None, None) for low, high in zip(lows, highs, strict=True)
    ]
    points = tuple(Point(k, float(share), *end) for k, share, end in zip(rows, whole, ends, strict=True))
    return Curve(domain, origin, int(sizes.sum()), len(sizes), points)
