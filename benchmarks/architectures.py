"""Every causal language model that transformers registers, tiny and random, exported and compared with transformers.

    python benchmarks/architectures.py --output FILE [--only NAME…] [--minutes N] [--document docs/models.md]

Each model is saved, exported as target and as its own trimmed drafter, and run on ONNX Runtime's CPU provider: the
target alone and the pair must generate transformers' greedy tokens, and the target's logits must be transformers', fed
as a prompt, one token and blocks after a past. A model that the export refuses is listed with the refusal. Models that
FILE has already are not run again, so that a run may be cut off. --document writes the table of FILE into that file.
"""

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from architectures_table import table, write_document
from tiny_configs import CHANGES, VOCABULARY, tiny_config
from tiny_models import FAMILIES, save_model

PROMPT, NEW = 40, 24  # tokens
SPECIAL = (1, 2)  # the end of a text, and padding
STEPS = ((0, 40), (40, 41), (41, 46), (46, 64))  # prompt, decode, and two blocks after a past
MOST_LOGIT_ERROR = 1e-3  # of the logits' standard deviation; agreeing graphs differ by about 4e-6
SECONDS = 180.0  # for one model, then it counts as hanging
PRELOADED = ["torch", "transformers", "onnxruntime", "onnxscript", "torch.onnx", "torch._dynamo"]


def names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES]), *(name for name in CHANGES if ":" in name)]


def reference(model: Any) -> tuple[list[int], NDArray[np.float32]]:
    """The prompt and transformers' greedy continuation, and the logits of all of it."""
    import torch

    ids = torch.randint(3, 250, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    ones = torch.ones_like(ids)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        whole = model.generate(
            ids, attention_mask=ones, max_new_tokens=NEW, do_sample=False, num_beams=1, pad_token_id=2
        )
        options = {}
        if "position_ids" in inspect.signature(model.forward).parameters and not hasattr(model.config, "text_config"):
            options["position_ids"] = torch.arange(whole.shape[1])[None]  # as generate gives them: RoBERTa's own differ
        mask = torch.ones_like(whole)
        logits = model(input_ids=whole, attention_mask=mask, use_cache=False, **options).logits[0].float()
    return whole[0].tolist(), logits.numpy()


def export_pair(model: Path, output: Path) -> Any:
    """Export the model as target and drafter. No calibration runs: the counts are random."""
    import transformers

    from engines.bundle.tokenizer import tokenizer_digest
    from vocabtrim_export.calibration import TokenCounts
    from vocabtrim_export.calibration.counting import CalibrationSettings
    from vocabtrim_export.pipeline import export
    from vocabtrim_export.settings import ExportSettings

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    counts = np.random.default_rng(0).permutation(VOCABULARY)
    counts[len(tokenizer) :] = 0
    place = model.with_name(f"{model.name}-counts.safetensors")  # not among the weights
    TokenCounts(counts, counts, tokenizer_digest(tokenizer.backend_tokenizer), ()).save(place)
    calibration = CalibrationSettings(calibration=(place,))
    return export(str(model), str(model), output, ExportSettings(k=192, max_length=128, calibration=calibration))


def compare(result: Any, ids: list[int], logits: NDArray[np.float32]) -> dict[str, Any]:
    from engines import load_engine
    from runtime import SpeculativeDecoder

    tokens = np.array(ids)
    # Some models count positions by the tokens that are no padding: what follows a generated one cannot be compared.
    end = next((at for at in range(PROMPT, len(ids)) if ids[at] in SPECIAL), len(ids))
    with load_engine(result.target) as engine:
        parts = [engine.feed(tokens[begin:stop], keep=stop - begin).logits for begin, stop in STEPS]
    error = float(np.abs(np.concatenate(parts) - logits)[:end].max() / logits.std())
    equal = []
    for drafter in (None, result.drafter):
        with SpeculativeDecoder.load(target=result.target, drafter=drafter) as decoder:
            made = decoder.generate(ids[:PROMPT], max_new_tokens=NEW)
        mine, wanted = list(map(int, made.token_ids)), ids[PROMPT:]
        equal.append(mine == wanted[: len(mine)] and (len(mine) == NEW or mine[-1] == 1))  # 1: the EOS
    is_equal = all(equal) and error < MOST_LOGIT_ERROR
    return {"status": "equal" if is_equal else "different", "logit_error": error, "tokens_equal": all(equal)}


def refusals_by_config(names: list[str]) -> dict[str, Any]:
    """The rows of models that are refused by their configuration alone, as most are: no weights are made for them."""
    from engines.errors import VocabtrimError
    from vocabtrim_export.sources.refusals import check_architecture
    from vocabtrim_export.sources.text_models import text_config

    rows = {}
    for name in names:
        try:
            check_architecture("MODEL", text_config("MODEL", tiny_config(name)))
        except VocabtrimError as error:
            rows[name] = {"status": "refused", "reason": str(error)}
        except Exception:  # transformers refuses the configuration: `run` reports it
            continue
    return rows


def run(name: str, pipe: Connection) -> None:
    """One model in a process of its own: sends its row."""
    import torch

    from engines.errors import VocabtrimError

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    work = Path(tempfile.mkdtemp(prefix="architecture-"))
    row: dict[str, Any] = {}
    try:
        try:
            model, row = save_model(name, work / "model")
        except Exception as error:
            pipe.send({"status": "not built", "reason": f"{type(error).__name__}: {error}"[:300]})
            return
        try:
            found = compare(export_pair(work / "model", work / "out"), *reference(model))
        except VocabtrimError as error:
            found = {"status": "refused", "reason": str(error).replace(str(work / "model"), "MODEL")}
        except Exception as error:
            found = {"status": "crash", "reason": f"{type(error).__name__}: {error}"[:300]}
        pipe.send(row | found)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_apart(name: str, context: Any) -> dict[str, Any]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(name, sender))
    process.start()
    sender.close()
    row: dict[str, Any] = {"status": "crash", "reason": f"no end within {SECONDS:.0f} s"}
    if receiver.poll(SECONDS):
        try:
            row = receiver.recv()
        except EOFError:
            row = {"status": "crash", "reason": "its process died"}
    process.join(2)
    if process.is_alive():
        process.kill()
        process.join()
    return row


def versions() -> dict[str, str]:
    import onnxruntime
    import torch
    import transformers

    return {module.__name__: module.__version__ for module in (transformers, torch, onnxruntime)}


def save(path: Path, rows: dict[str, Any]) -> None:
    ordered = {name: rows[name] for name in sorted(rows)}
    path.write_text(json.dumps({"versions": versions(), "architectures": ordered}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="JSON file with a row for each architecture")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="run these, also where the file has them")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after the model that is running then")
    parser.add_argument("--document", type=Path, help="Markdown file whose table is rewritten")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = json.loads(options.output.read_text())["architectures"] if options.output.exists() else {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    until = time.monotonic() + 60 * options.minutes
    todo = options.only if options.only is not None else [name for name in names() if name not in rows]
    rows = {name: row for name, row in rows.items() if name not in todo} | refusals_by_config(todo)
    save(options.output, rows)
    for name in [name for name in todo if name not in rows]:
        if time.monotonic() > until:
            break
        rows[name] = row = run_apart(name, context)
        print(f"{name}: {row['status']} {row.get('reason', '')[:160]}", flush=True)
        save(options.output, rows)
    print(dict(Counter(row["status"] for row in rows.values())), len(set(names()) - rows.keys()), "to go")
    if options.document:
        write_document(options.document, table(rows, names()))
    return 1 if any(row["status"] in ("different", "crash") for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
