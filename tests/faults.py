"""Exports and calibrations that are killed, or refused by the disk, at every single change they make to files.

`python -m tests.faults JOB WORK` with JOB of exports (to an empty place, and over earlier bundles) or calibration; WORK
is an empty directory. It counts the faults and fails at the first that leaves neither the old state nor the new one. A
fault point is a file opened for writing, renamed, removed, made or flushed below WORK: no clock is involved.
"""

import errno
import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive a fork

import torch
import transformers

from engines.bundle.atomic_replace import LOCK_NAME
from engines.bundle.read import read_bundle
from engines.errors import VocabtrimError
from vocabtrim_export import pipeline
from vocabtrim_export.bundles import writer
from vocabtrim_export.bundles.output import COUNTS_NAME, alone, reserved
from vocabtrim_export.calibration import BatchLimits, Corpus, CountSettings, Document, TokenCounts, calibrate
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.proof import proven

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DONE, REFUSED, FAILED = 0, 3, 4


def fault_at(number: int, root: Path, strike: Callable[[], None]) -> None:
    """Call `strike` just before the change with this number, from 0, to anything below `root`."""
    state = {"left": number}

    def change(path: object) -> None:
        if not str(path).startswith(str(root)):
            return
        state["left"] -= 1
        if state["left"] == -1:
            strike()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and (set(str(arguments[1] or "")) & set("wax+") or (arguments[2] or 0) & WRITING):
            change(arguments[0])
        elif event in CHANGES:
            change(root if event == "fcntl.flock" else arguments[0])

    flush = os.fsync
    os.fsync = lambda descriptor: (change(os.readlink(f"/proc/self/fd/{descriptor}")), flush(descriptor))[1]
    sys.addaudithook(hook)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(work: Callable[[], None]) -> int:
    """The exit status of `work` in a fork: DONE, REFUSED (one line, or a full disk), FAILED, or minus the signal."""
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            work()
            status = DONE
        except VocabtrimError:
            status = REFUSED
        except OSError as error:
            status = REFUSED if error.errno == errno.ENOSPC else FAILED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def everywhere(job: Callable[[], None], root: Path, before: Callable[[], None], after: Callable[[int], None]) -> None:
    """Run `job` with a fault at its first change, its second and so on until none is left, in both kinds."""
    gc.collect()
    gc.freeze()  # a fork that collected garbage would copy every page that holds objects
    for name, strike, expected in (("killed", kill, {-signal.SIGKILL}), ("disk full", full_disk, {REFUSED, DONE})):
        for number in count():
            before()
            reached = root.with_name("reached")
            reached.unlink(missing_ok=True)

            def work(number: int = number, strike: Callable[[], None] = strike, reached: Path = reached) -> None:
                fault_at(number, root, lambda: (reached.touch(), strike()))
                job()

            status = in_child(work)
            after(number)
            if not reached.exists():
                assert status == DONE, status
                break
            assert status in expected, (name, number, status)  # DONE: what cleans up goes on without
        print(f"{name} at each of {number} changes: the old state or the new one", flush=True)


def tiny_model(work: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    return work / "model"


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|bos|>", "<|end|>", *(f"w{i}" for i in range(300))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>")


def exports(work: Path) -> None:
    model, out, old = tiny_model(work, tiny_tokenizer()), work / "out", work / "old"
    loaded = pipeline.load_source(str(model), torch.float32)
    traced = {length: proven.trace(loaded.model, torch.float32, length) for length in (64, 96)}
    counts = work / "counts.safetensors"
    numbers = torch.arange(448).numpy()
    TokenCounts(numbers, numbers, loaded.tokenizer_digest, ()).save(counts)
    pipeline.load_source = lambda *_: loaded
    proven.trace = lambda _model, _dtype, length, *_: traced[length]
    proven.find_difference = lambda *_: None  # a fork must not run the threads of PyTorch

    def export(length: int, force: bool) -> None:
        calibration = CalibrationSettings(calibration=(counts,))
        settings = pipeline.ExportSettings(k=192, max_length=length, calibration=calibration, force=force)
        pipeline.export(str(model), str(model), out, settings)

    def export_all() -> None:
        for length in traced:
            export(length, force=True)

    def before(again: bool) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if again:
            shutil.copytree(old, out)

    def after(number: int, again: bool) -> None:
        states = [state(out / role) for role in ("drafter", "target")]
        assert states in ([[64, 64], [96, 96]] if again else [[None, None], [96, 96]]), states
        if number % 4 == 3:  # a second is what an export takes
            status = in_child(lambda: export(96, force=again))
            assert status == (DONE if again or states[0] is None else REFUSED), status
            assert [state(out / role) for role in ("drafter", "target")] == [96, 96]
        with reserved(out):
            left = {path.name for path in out.iterdir()} - {LOCK_NAME}
        assert left in (set(), {"drafter", "target"}), left

    lower_beforehand(export_all)
    shutil.rmtree(out)
    assert in_child(lambda: export(64, force=False)) == DONE
    out.rename(old)
    for again in (False, True):
        export_it = partial(export, 96, force=again)
        everywhere(export_it, out, partial(before, again), partial(after, again=again))


def lower_beforehand(run: Callable[[], None]) -> None:
    """Lower every graph that `run` exports here and now: a fork then only writes it."""
    lower, calls = writer.lower, []

    def key(traced: Any, weights: Any) -> tuple[int, bool]:
        return id(traced), weights.vocab_map is None

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return lower(*arguments)

    writer.lower = noted
    run()
    lowered = {key(*arguments): lower(*arguments) for arguments in calls}
    writer.lower = lambda *arguments: lowered[key(*arguments)]


def state(bundle: Path) -> int | None:
    """The context length of a bundle that is whole, None where there is none. Raises for one that is damaged."""
    try:
        return read_bundle(bundle).manifest.context_length
    except VocabtrimError:
        if bundle.exists():
            raise
        return None


def calibrations(work: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(work, tokenizer)).eval()
    documents = [Document(" ".join(f"w{(i * j) % 300}" for j in range(1, 9))) for i in range(24)]
    corpus, place = Corpus.of(documents, "test"), work / "counting" / COUNTS_NAME
    limits = BatchLimits(batch_size=8, max_prompt_tokens=8, max_new_tokens=4)

    def run(path: Path) -> None:
        with alone(path):
            settings = CountSettings("target", max_tokens=45, seed=1, limits=limits)
            calibrate(model, tokenizer, corpus, settings, checkpoint=path, save_seconds=0.0)

    def before() -> None:
        shutil.rmtree(place.parent, ignore_errors=True)

    def after(_number: int) -> None:
        if place.exists():
            assert TokenCounts.load(place).total <= whole.total
        assert in_child(lambda: run(place)) == DONE
        assert place.read_bytes() == (work / "whole.safetensors").read_bytes()
        assert [path.name for path in place.parent.iterdir()] == [COUNTS_NAME]

    assert in_child(lambda: run(work / "whole.safetensors")) == DONE
    whole = TokenCounts.load(work / "whole.safetensors")
    everywhere(lambda: run(place), place.parent, before, after)


def main() -> None:
    torch.set_num_threads(1)
    job, work = sys.argv[1], Path(sys.argv[2]).resolve()
    if job == "calibration":
        calibrations(work)
    else:
        exports(work)


if __name__ == "__main__":
    main()
