"""`python -m tests.fuzz --seconds N [--target NAME]`: mutated files for every reader, until one of them misbehaves.

A reader may succeed or raise `VocabtrimError` with one line, within two seconds and 2 GiB. What does otherwise is kept
in the corpus, to be tried first from then on.
"""

import argparse
import faulthandler
import hashlib
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

from engines.errors import VocabtrimError
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
MOST_SECONDS, MOST_MEMORY = 2.0, 2 << 30


def attempt(target: str, data: bytes, directory: Path) -> str | None:
    """Returns why this input is a finding, or None."""
    function, name = TARGETS[target]
    path = directory / name
    path.write_bytes(data)
    began = time.perf_counter()
    try:
        function(path)
    except VocabtrimError as error:
        if len(str(error)) > 2000:
            return f"a message of {len(str(error))} characters"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-4:])
    took = time.perf_counter() - began
    return f"took {took:.1f} s" if took > MOST_SECONDS else None


def fuzz(target: str, seconds: float, seed: int) -> tuple[int, list[str]]:
    """Inputs tried, and findings, each kept in the corpus."""
    files = sorted((CORPUS / target).iterdir())
    seeds, random, findings, tried = [file.read_bytes() for file in files], Random(seed), [], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        directory = Path(name)
        (directory / "model.onnx.data").write_bytes(bytes(4096))  # beside the graph
        for file, data in zip(files, seeds, strict=True):
            if wrong := attempt(target, data, directory):
                findings.append(f"{file}: {wrong}")
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(findings) < 5:
            data = mutate(target, seeds, random)
            tried += 1
            if wrong := attempt(target, data, directory):
                kept = CORPUS / target / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
                kept.write_bytes(data)
                findings.append(f"{kept}: {wrong}")
    return tried, findings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each target")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()
    import gguf  # noqa: F401 - imports take memory of their own
    import onnx  # noqa: F401

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))
    bad = False
    for target in [options.target] if options.target else TARGETS:
        tried, findings = fuzz(target, options.seconds, options.seed)
        print(f"{target}: {tried} inputs, {len(findings)} findings", flush=True)
        for finding in findings:
            print(finding, file=sys.stderr)
        bad = bad or bool(findings)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
