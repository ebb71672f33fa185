"""`vocabtrim bench --profile`: profiles of one generation."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from vocabtrim_export.cli.bench_options import Bundles


def write_profile(bundles: Bundles, prompt: Sequence[int], draft_length: int, tokens: int, directory: Path) -> None:
    """Generate once more on the CPU, with the last of the drafters, under ONNX Runtime's profiler.

    Writes target.json and drafter.json, the time of each operator, drafter_features.json of an EAGLE head, and
    rounds.json, the phases of the rounds: Chrome traces, for Perfetto.

    Args:
        bundles: The bundles of the bench.
        prompt: Token ids.
        draft_length: γ.
        tokens: New tokens.
        directory: The directory to write to.

    Raises:
        VocabtrimError: The profile cannot be written.
    """
    from engines import load_engine
    from runtime import decode_rounds
    from runtime.profiling import ChromeTrace

    trace = ChromeTrace()
    with ExitStack() as stack:
        target = stack.enter_context(load_engine(bundles.target, profile=directory / "target.json"))
        drafter = None
        for path in list(bundles.drafters.values())[-1:]:
            drafter = stack.enter_context(load_engine(path, "cpu", target, directory / "drafter.json"))
        for _ in decode_rounds(
            target, drafter, prompt, max_new_tokens=tokens, draft_length=draft_length, profiler=trace
        ):
            pass
    trace.save(directory / "rounds.json")
