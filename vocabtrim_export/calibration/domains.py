"""Domains of calibration data, `name=path[:weight]`: counted apart, and mixed by weight."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.corpus import Corpus, read_corpus
from vocabtrim_export.calibration.counts import TokenCounts, mixed

_MOST_WEIGHT = 1000
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Domain:
    """One kind of data.

    Attributes:
        name: Its name, which the counts' file keeps.
        weight: Its share of the mixture, relative to the other domains' weights.
        corpus: Its documents.
    """

    name: str
    weight: float
    corpus: Corpus


def read_domains(names: Sequence[str | Path]) -> tuple[Domain, ...]:
    """Read the domains that `--calibration name=path[:weight]` names.

    Returns:
        The domains; none where the arguments are plain paths.

    Raises:
        VocabtrimError: Only some of the arguments have names, two have the same, a weight is no positive number, or a
            file cannot be read.
    """
    parsed = [_parse(str(name)) for name in names]
    if not any(parsed):
        return ()
    domains: dict[str, tuple[Path, float]] = {}
    for argument, each in zip(names, parsed, strict=True):
        if each is None:
            raise VocabtrimError(f"--calibration {argument} has no name, others have one: write NAME={argument}")
        name, path, weight = each
        if name in domains:
            raise VocabtrimError(f"--calibration names the domain {name} twice: give each a name of its own")
        domains[name] = path, weight
    return tuple(Domain(name, weight, read_corpus([path])) for name, (path, weight) in domains.items())


def divided_tokens(domains: Sequence[Domain], tokens: int | Literal["auto"]) -> list[int | Literal["auto"]]:
    """Divide a number of tokens among domains by their weights.

    Args:
        domains: The domains.
        tokens: The tokens of all domains; "auto": each counts as many as are enough for it.

    Returns:
        The tokens of each domain.

    Raises:
        VocabtrimError: So few tokens leave none to some domain.
    """
    if tokens == "auto":
        return ["auto" for _ in domains]
    ends = [0, *accumulate(domain.weight for domain in domains)]
    places = [round(tokens * end / ends[-1]) for end in ends]
    shares: list[int | Literal["auto"]] = [end - begin for begin, end in pairwise(places)]
    if 0 in shares:
        needed = math.ceil(ends[-1] / min(domain.weight for domain in domains))
        raise VocabtrimError(f"--calibration-tokens {tokens} leaves none to some domain: count at least {needed}")
    return shares


def mix(domains: Sequence[Domain], counts: Sequence[TokenCounts]) -> TokenCounts:
    """Add up the domains' counts by weight.

    Args:
        domains: The domains.
        counts: The counts of each.

    Returns:
        Counts in which every domain has the share of tokens that its weight states. They hold each domain's own counts
        too.
    """
    parts = [
        replace(each, runs=(replace(each.runs[0], domain=domain.name, weight=domain.weight),))
        for domain, each in zip(domains, counts, strict=True)
    ]
    return mixed(parts)


def coverage_by_domain(counts: TokenCounts, kept: NDArray[np.int64]) -> dict[str, float]:
    """Returns the share of each domain's held-out tokens that are among `kept` (ids).

    Domains without held-out tokens are left out.
    """
    return {
        each.runs[0].domain: int(each.held_out[kept[kept < each.full_vocab]].sum()) / int(each.held_out.sum())
        for each in counts.domains
        if each.held_out.any()
    }


def domains_note(counts: TokenCounts, kept: NDArray[np.int64]) -> tuple[str, ...]:
    """Returns a line with `coverage_by_domain`, or nothing where the counts have no domains."""
    shares = coverage_by_domain(counts, kept)
    each = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    return (f"coverage by domain: {each}",) if shares else ()


def _parse(text: str) -> tuple[str, Path, float] | None:
    """Returns the name, the path and the weight of `name=path[:weight]`; None for a plain path."""
    match = _NAMED.fullmatch(text)
    if match is None or Path(text).exists():
        name, _, path = text.partition("=")
        if not Path(text).exists() and path and Path(path).exists():
            raise VocabtrimError(f"--calibration {text}: the name {name!r} is not of letters, digits, '_', '-' and '.'")
        return None
    name, rest = match[1], match[2]
    path, colon, weight = rest.rpartition(":")
    if not colon or Path(rest).exists() or path == "hf":
        return name, Path(rest), 1.0
    if not path:
        raise VocabtrimError(f"--calibration {text}: the path is missing, write {name}=PATH{rest}")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 1 / _MOST_WEIGHT <= value <= _MOST_WEIGHT:
        raise VocabtrimError(
            f"--calibration {text}: the weight {weight!r} is not a positive number from {1 / _MOST_WEIGHT:g} to "
            f"{_MOST_WEIGHT}, such as 2 or 0.5"
        )
    return name, Path(path), value
