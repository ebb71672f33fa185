"""Measure the cost of a JSON schema: CPU microseconds a mask, and tokens/s of a pair with the schema and without.

Texts with the schema and without are generated in turns; the schema demands more than the tokens that are given.

    python benchmarks/json_schema.py --target BUNDLE --drafter BUNDLE
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from runtime import SpeculativeDecoder
from runtime.json_schema import JsonConstraint
from runtime.measure.environment import environment

SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "born": {"type": "integer", "minimum": 1000, "maximum": 2030},
            "fields": {"type": "array", "items": {"enum": ["physics", "chemistry", "mathematics"]}, "maxItems": 3},
        },
        "required": ["name", "born", "fields"],
        "additionalProperties": False,
    },
}
PROMPTS = (
    "List famous scientists as JSON, each with name, year of birth and fields.",
    "Write a JSON array of people with their name, the year in which they were born, and what they study.",
)


class Clock:
    """Notes the CPU time of each call of a method of `JsonConstraint`, in microseconds."""

    def __init__(self, method: str) -> None:
        self.times: list[float] = []
        call = getattr(JsonConstraint, method)

        def timed(constraint: JsonConstraint, *arguments: Any) -> Any:
            start = time.thread_time()
            result = call(constraint, *arguments)
            self.times.append(1e6 * (time.thread_time() - start))
            return result

        setattr(JsonConstraint, method, timed)

    def summary(self) -> dict[str, float]:
        times = sorted(self.times)
        return {
            "calls": len(times),
            "median": statistics.median(times),
            "mean": statistics.fmean(times),
            "p99": times[int(0.99 * (len(times) - 1))],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    clocks = {name: Clock(name) for name in ("allowed", "advance", "rewind")}
    speeds: dict[str, list[float]] = {"schema": [], "text": []}
    shares: dict[str, list[float]] = {"schema": [], "text": []}
    with SpeculativeDecoder.load(options.target, options.drafter) as decoder:
        start = time.perf_counter()
        decoder.check_json_schema(SCHEMA)
        first = time.perf_counter() - start
        start = time.perf_counter()
        decoder.check_json_schema(SCHEMA)
        compiled = time.perf_counter() - start
        for _ in range(options.turns):
            for prompt in PROMPTS:
                for name, schema in (("text", None), ("schema", SCHEMA)):
                    stats = decoder.generate(prompt, max_new_tokens=options.tokens, json_schema=schema).stats
                    speeds[name].append(stats.tokens_per_second)
                    shares[name].append(stats.accepted / max(stats.drafted, 1))
    result = {
        "first_schema_ms": 1e3 * first,
        "schema_ms": 1e3 * compiled,
        "microseconds": {name: clock.summary() for name, clock in clocks.items()},
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "accepted_of_drafted": {name: statistics.fmean(values) for name, values in shares.items()},
        "environment": environment(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
