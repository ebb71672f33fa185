"""`ExportReport`: all known facts about an export, from its bundles, its token counts, benches and texts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle.read import MANIFEST_NAME, Bundle, Manifest, Role, read_bundle
from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.output import COUNTS_NAME
from vocabtrim_export.calibration import TokenCounts, read_corpus
from vocabtrim_export.calibration.likely_order import likely_order
from vocabtrim_export.reports.benches import Bench, named_path, read_bench
from vocabtrim_export.reports.coverage import Curve, curve_of_counts, curve_of_documents, grid, places
from vocabtrim_export.reports.lost_tokens import KeptTokens, MarkedLine, kept_tokens, marked_lines
from vocabtrim_export.version import __version__


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """The inputs of a report.

    Attributes:
        directory: The output directory of an export, or one bundle.
        counts: The token counts that chose the head; None: those in `directory`, if it has some.
        benches: Files that `vocabtrim bench --json` wrote, each as a path or "name=path".
        texts: Files of text in which lost tokens are marked, each as a path or "name=path".
    """

    directory: Path
    counts: Path | None = None
    benches: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportReport:
    """All known facts about an export.

    Attributes:
        name: The directory's name.
        version: The version that made the report.
        bundles: The manifest of each bundle.
        digests: The digest of each bundle's manifest, which identifies the bundle.
        coverage: Coverage by K, a curve for each domain.
        kept: The calibration's tokens that the head keeps and lacks; None where that is not known.
        benches: The benches.
        lines: Lines of the texts in which the head lacks tokens.
        missing: Facts that are not known, and how to find them out.
    """

    name: str
    version: str
    bundles: Mapping[Role, Manifest]
    digests: Mapping[Role, str]
    coverage: tuple[Curve, ...]
    kept: KeptTokens | None
    benches: tuple[Bench, ...]
    lines: tuple[MarkedLine, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as data for `json.dumps`."""
        return asdict(self)


def make_report(inputs: ReportInputs) -> ExportReport:
    """Read an export and everything measured about it. Every file of a bundle is checked against its digest.

    Raises:
        VocabtrimError: The directory holds no export, a file is damaged, or counts or benches belong to another export.
    """
    bundles = _read_bundles(inputs.directory)
    manifests = {role: bundle.manifest for role, bundle in bundles.items()}
    benches = tuple(read_bench(argument, manifests) for argument in inputs.benches)
    missing = [] if benches else ["No bench was given, so that speed and acceptance are unknown: --bench FILE."]
    curves: tuple[Curve, ...] = ()
    kept: KeptTokens | None = None
    lines: tuple[MarkedLine, ...] = ()
    drafter = bundles.get("drafter")
    if drafter is None or drafter.vocab_map is None:
        missing.append("No drafter with a trimmed head is here, so that no token is lost.")
    else:
        counts = _read_counts(inputs, drafter.manifest)
        if counts is None:
            missing.append(f"There is no {COUNTS_NAME}, so that lost tokens are unknown: --counts FILE.")
        if not inputs.texts:
            missing.append("Token counts keep no text, so that no lost token is shown in its line: --text FILE.")
        tokens = _Tokens.of(drafter, counts)
        counts = None if counts is None else counts.resized(len(tokens.place))
        kept = None if counts is None else kept_tokens(counts, tokens.kept, tokens.tokenizer)
        curves = () if counts is None else _calibrated_curves(counts, tokens)
        for domain, documents in _read_texts(inputs.texts):
            curves += _text_curves(domain, documents, tokens)
            lines += marked_lines(domain, sum(documents, ()), tokens.tokenizer, tokens.is_kept)
    name, digests = inputs.directory.resolve().name, {role: each.digest for role, each in manifests.items()}
    return ExportReport(name, __version__, manifests, digests, curves, kept, benches, lines, tuple(missing))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A trimmed drafter's tokens.

    Attributes:
        tokenizer: The drafter's tokenizer.
        kept: int64[K], the ids that its head keeps.
        is_kept: bool[vocabulary].
        place: int64[vocabulary], see `places`.
        rows: The values of K that curves show.
    """

    tokenizer: Tokenizer
    kept: NDArray[np.int64]
    is_kept: NDArray[np.bool_]
    place: NDArray[np.int64]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, drafter: Bundle, counts: TokenCounts | None) -> "_Tokens":
        assert drafter.vocab_map is not None
        kept, size = drafter.vocab_map.kept_token_ids, drafter.vocab_map.full_vocab
        seen = np.zeros(size, np.int64)
        if counts is not None:
            size = max(size, counts.full_vocab)
            seen = counts.resized(size).counts
        is_kept = np.zeros(size, np.bool_)
        is_kept[kept] = True
        place = places(kept, likely_order(seen))
        rows = grid(len(kept), size) if counts is not None else (len(kept), size)
        return cls(Tokenizer.load(drafter.path), kept, is_kept, place, rows)


def _read_bundles(directory: Path) -> dict[Role, Bundle]:
    if (directory / MANIFEST_NAME).is_file():
        bundle = read_bundle(directory)
        return {bundle.manifest.role: bundle}
    roles: tuple[Role, ...] = ("drafter", "target")
    bundles = {role: read_bundle(directory / role) for role in roles if (directory / role).is_dir()}
    if not bundles:
        raise VocabtrimError(f"{directory} holds no export: give the --output of vocabtrim-export, or one bundle")
    for role, bundle in bundles.items():
        if bundle.manifest.role != role:
            raise VocabtrimError(f"{bundle.path} holds a {bundle.manifest.role}: give the bundle itself")
    return bundles


def _read_counts(inputs: ReportInputs, drafter: Manifest) -> TokenCounts | None:
    """Returns the counts that chose the drafter's tokens; None where there are none."""
    path = inputs.counts or inputs.directory / COUNTS_NAME
    if inputs.counts is None and not path.exists():
        return None
    counts = TokenCounts.load(path)
    if counts.digest != (drafter.calibration or {}).get("digest"):
        raise VocabtrimError(
            f"{path} holds other counts than those that chose this drafter's tokens: give --counts FILE"
        )
    return counts


def _calibrated_curves(counts: TokenCounts, tokens: _Tokens) -> tuple[Curve, ...]:
    named = {each.runs[0].domain: each for each in counts.domains} | {"all": counts}
    return tuple(
        curve_of_counts(name, each.held_out, tokens.place, tokens.rows)
        for name, each in named.items()
        if each.held_out.any()
    )


def _read_texts(arguments: Sequence[str]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Returns the name of each file and the texts of its documents; of a conversation, the assistant's messages."""
    return [
        (name, [document.counted_texts for document in read_corpus([path]).documents])
        for name, path in map(named_path, arguments)
    ]


def _text_curves(domain: str, documents: Sequence[tuple[str, ...]], tokens: _Tokens) -> tuple[Curve, ...]:
    backend = tokens.tokenizer.backend
    encoded = [
        [token for each in backend.encode_batch(list(texts), add_special_tokens=False) for token in each.ids]
        for texts in documents
    ]
    ids = [np.array(each, np.int64) for each in encoded if each]
    return (curve_of_documents(domain, "text", ids, tokens.place, tokens.rows),) if ids else ()
