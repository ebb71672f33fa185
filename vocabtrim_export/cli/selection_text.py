"""K and selections as words: read from the command line, and explained on the terminal."""

from typing import TYPE_CHECKING, Literal

from engines.errors import VocabtrimError

if TYPE_CHECKING:
    from vocabtrim_export.selection import Coverage, Selection


def parse_k(text: str) -> "int | Coverage | Literal['auto']":
    """Parse `--k`, such as "32000", "coverage:0.95" or "auto", to what `ExportSettings` takes.

    Raises:
        VocabtrimError: It is none of these.
    """
    from vocabtrim_export.selection import Coverage

    if text.strip() == "auto":
        return "auto"
    name, colon, share = text.strip().partition(":")
    try:
        return Coverage(float(share)) if colon and name == "coverage" else int(text)
    except ValueError as error:
        raise VocabtrimError(
            f"K = {text!r} is not understood: give a number of rows such as 32000, coverage:0.95, or auto"
        ) from error


def notes(selection: "Selection", builtin: bool) -> list[str]:
    """Returns notes for the user about this selection.

    Args:
        selection: The kept tokens.
        builtin: Whether they were counted on the built-in corpus.
    """
    lines = []
    if builtin:
        lines.append("no --calibration given: counted on Python's documentation; results on your prompts will differ")
    if selection.is_noop:
        lines.append(f"K covers the whole vocabulary of {selection.vocab_map.full_vocab} tokens: nothing is trimmed")
    elif selection.filler > len(selection.vocab_map) // 4:
        lines.append(
            f"{selection.filler} of {len(selection.vocab_map)} rows were never counted and are chosen by token id: the "
            f"calibration holds only {selection.counted} different tokens; calibrate on more, or more varied, text, or "
            "keep fewer rows"
        )
    asked = selection.requested_coverage
    if asked and selection.coverage is not None and selection.coverage < asked:
        lines.append(
            f"coverage is {selection.coverage:.4f}, not {asked}: the target or the head lacks the missing tokens"
        )
    return lines


def kept(selection: "Selection") -> str:
    """Returns how many tokens are kept, why, and which share of held-out tokens they cover, in one line."""
    coverage = "" if selection.coverage is None else f", {selection.coverage:.2%} of held-out tokens"
    return (
        f"kept {len(selection.vocab_map)} of {selection.vocab_map.full_vocab} tokens{coverage} "
        f"({selection.counted} counted, {selection.always_kept} always kept, {selection.filler} filler)"
    )
