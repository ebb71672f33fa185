"""Is the planner right? Its choice of drafter and draft length against an exhaustive sweep, on real bundles.

python benchmarks/planner.py --target DIR --drafter DIR [DIR…] --prompts PATH [--json FILE]
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

from engines import load_engine
from engines.bundle.tokenizer import Tokenizer
from runtime import SpeculativeDecoder
from runtime.measure.environment import environment
from runtime.measure.plan_measurement import make_plan
from runtime.measure.sweep import SweepSettings, sweep
from vocabtrim_export.calibration import read_corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--num-prompts", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        target = stack.enter_context(load_engine(options.target))
        drafters = {str(path): stack.enter_context(load_engine(path, "cpu", target)) for path in options.drafter}
        decoder = SpeculativeDecoder(target, tokenizer=Tokenizer.load(options.target))
        documents = read_corpus(options.prompts).documents[: options.num_prompts]
        prompts = [decoder.encode([{"role": m.role, "content": m.content} for m in d.prompt]) for d in documents]
        settings = SweepSettings((1, 2, 3, 4, 6, 8), (), 64, 2)
        planned = make_plan(target, drafters, prompts, settings)
        swept = sweep(target, drafters, prompts, settings)
    measured = {(row.drafter, row.draft_length): row.report.decode_tokens_per_second for row in swept.rows}
    best = planned.plan.best
    report = {
        "chosen": [best.drafter, best.draft_length],
        "chosen_over_best": measured[best.drafter, best.draft_length] / max(measured.values()),
        "combinations": [
            {
                "drafter": c.drafter,
                "draft_length": c.draft_length,
                "planned_tokens_per_second": c.tokens_per_second,
                "measured_tokens_per_second": measured[c.drafter, c.draft_length],
            }
            for c in planned.plan.candidates
        ],
        "lossless": swept.lossless,
        "environment": environment(),
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.json:
        options.json.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
