"""What a selection means, in words for the terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vocabtrim_export.selection import Selection


def notes(selection: "Selection", builtin: bool) -> list[str]:
    """What the user should know about this selection."""
    found = []
    if builtin:
        found.append("no --calibration given: counted on Python's own documentation, which is like no user's prompts")
    if selection.is_noop:
        found.append(f"K covers the whole vocabulary of {selection.vocab_map.full_vocab} tokens: nothing is trimmed")
    elif selection.filler > len(selection.vocab_map) // 4:
        found.append(
            f"{selection.filler} of {len(selection.vocab_map)} rows were never counted and only fill up K: "
            "more --calibration-tokens would choose better ones, or a smaller K would do"
        )
    asked = selection.requested_coverage
    if asked and selection.coverage is not None and selection.coverage < asked:
        found.append(
            f"coverage is {selection.coverage:.4f}, not {asked}: the target or the head lacks the missing tokens"
        )
    return found


def kept(selection: "Selection") -> str:
    coverage = "" if selection.coverage is None else f", {selection.coverage:.2%} of held-out tokens"
    return (
        f"kept {len(selection.vocab_map)} of {selection.vocab_map.full_vocab} tokens{coverage} "
        f"({selection.counted} counted, {selection.always_kept} always kept, {selection.filler} filler)"
    )
