"""One way of decoding in a process of its own.

`run.py` starts it with the directory of models, the precision and the way's name. It prints a JSON line when the way is
loaded, then answers each line {"prompt": token ids, "tokens": n} with the greedy tokens, and ends with its input.
"""

import json
import sys
from pathlib import Path
from time import perf_counter

from ways import ways


def main() -> None:
    models, precision, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    replies = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not end up between the replies
    load = ways(models, precision)[name].load  # type: ignore[arg-type]
    assert load is not None
    start = perf_counter()
    program = load()
    print(json.dumps({"load_seconds": perf_counter() - start}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = perf_counter()
        tokens = program.decode(request["prompt"], request["tokens"])
        seconds = perf_counter() - start
        reply = {"tokens": tokens, "seconds": seconds, "peak_megabytes": peak_megabytes(program.pid)}
        print(json.dumps(reply), file=replies, flush=True)


def peak_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
