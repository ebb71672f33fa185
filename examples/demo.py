"""The main job on real weights: SmolLM2-135M-Instruct drafts for itself, as an int4 copy with a trimmed head.

Every step is a command that you could type; it is printed before it runs. Run through `make demo`.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="the .gguf file of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, required=True, help="directory for the bundles")
    options = parser.parse_args()
    start = time.monotonic()
    trimmed, full = options.output / "trimmed", options.output / "full"
    quantized = f"--drafter {options.model} --quantize-drafter int4 --max-length 2048"
    if not (trimmed / "target").exists():
        calibration = f"--calibration {HERE / 'calibration.jsonl'} --calibration-tokens 40000"
        run(f"vocabtrim-export {quantized} --target {options.model} --k 16384 {calibration} --output {trimmed}")
    if not (full / "drafter").exists():  # what the trimmed drafter is compared with
        counts = f"--calibration {trimmed / 'token_counts.safetensors'}"
        run(f"vocabtrim-export {quantized} --k 49152 {counts} --output {full}")
    pair = f"--target {trimmed / 'target'} --drafter {trimmed / 'drafter'} --draft-length 2"
    prompt = shlex.quote("Why does the moon always show us the same side?")
    run(f"vocabtrim generate {pair} --prompt {prompt} --max-new-tokens 96")
    prompts = f"--prompts {HERE / 'prompts.jsonl'} --num-prompts 8 --max-new-tokens 96"
    run(f"vocabtrim bench {pair} --baseline-drafter {full / 'drafter'} {prompts} --repeats 2")
    print(f"done in {time.monotonic() - start:.0f} s; the bundles are in {options.output}")


def run(command: str) -> None:
    print(f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    subprocess.run([Path(sys.executable).parent / program, *arguments], check=True)


if __name__ == "__main__":
    main()
