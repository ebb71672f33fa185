"""Train an EAGLE-3 head on the shards of generate.py. A run that ended early goes on where its last checkpoint was."""

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Corpus, read_shards
from loss import make_labels, unroll, weighted
from model import Eagle3Head, head_from_target, replace, save_head
from safetensors import safe_open
from safetensors.torch import save_file
from target import Target, pick_device
from torch import Tensor

STATE = "training_state.safetensors"
LOG = "training_log.jsonl"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--target", type=Path, required=True, help="Hugging Face directory of the target")
    parser.add_argument(
        "--work", type=Path, required=True, help="directory of the shards and of the state to resume from"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory for the head and training_log.jsonl")
    parser.add_argument("--minutes", type=float, default=4.5, help="training time, those of earlier runs included")
    parser.add_argument(
        "--steps", type=int, default=100_000, help="optimizer steps; training ends here or at --minutes"
    )
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--draft-steps", type=int, default=5, help="unrolled steps of the training-time test")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--loss-rows", type=int, default=0, help="judge by this many frequent tokens (0: by all)")
    parser.add_argument("--save-minutes", type=float, default=1.0, help="between checkpoints")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@dataclass(slots=True)
class TrainingState:
    """Progress, earlier runs included. seconds: time spent training. tokens: tokens read, without padding."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = pick_device()
    target = Target.load(options.target, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    shards = read_shards(options.work, target.digest)
    if not shards:
        raise SystemExit(f"{options.work} holds no shards; run generate.py --work {options.work} first")
    corpus = Corpus(shards)
    print(f"{len(corpus.lengths)} sequences, {sum(corpus.lengths)} tokens", flush=True)
    torch.manual_seed(options.seed)
    head = head_from_target(target)
    optimizer = torch.optim.AdamW(head.parameters(), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    state = options.work / STATE
    progress = restore(head, optimizer, state) if state.exists() else TrainingState()
    options.output.mkdir(parents=True, exist_ok=True)
    trim_log(options.output / LOG, progress.step)
    train(head, target, corpus, optimizer, progress, options)


def train(
    head: Eagle3Head,
    target: Target,
    corpus: Corpus,
    optimizer: torch.optim.Optimizer,
    progress: TrainingState,
    options: argparse.Namespace,
) -> None:
    """Until the minutes or the steps are spent. Writes the log, checkpoints and the head."""
    device = target.embedding.device
    unembedding = target.unembedding
    if 0 < options.loss_rows < len(unembedding):
        unembedding = unembedding[corpus.frequent(options.loss_rows).to(device)]
    begin = time.monotonic() - progress.seconds
    saved = progress.seconds
    batches = itertools.islice(corpus.batches(options.batch_tokens, options.seed), progress.step, None)
    with (options.output / LOG).open("a") as log:
        while progress.step < options.steps and progress.seconds < 60 * options.minutes:
            ids, mask = next(batches)
            progress.tokens += int(mask.sum())
            rate = learning_rate(progress, options)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
            losses, agreements = train_step(head, target, optimizer, ids, mask, unembedding, options.draft_steps)
            progress.step += 1
            if progress.step % options.log_every == 0:  # reading the numbers waits for the device
                entry = {
                    "step": progress.step,
                    "tokens": progress.tokens,
                    "loss": [round(float(x), 4) for x in losses],
                    "agreement": [round(float(x), 4) for x in agreements],
                    "seconds": round(time.monotonic() - begin, 2),
                    "learning_rate": rate,
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                print(json.dumps(entry), flush=True)
            progress.seconds = time.monotonic() - begin
            if progress.seconds - saved > 60 * options.save_minutes:
                saved = progress.seconds
                checkpoint(head, target, optimizer, progress, options)
    checkpoint(head, target, optimizer, progress, options)


def learning_rate(progress: TrainingState, options: argparse.Namespace) -> float:
    """Linear warm-up, then linearly to zero with the larger share spent: of the time or of the steps."""
    spent = max(progress.step / options.steps, progress.seconds / (60 * options.minutes))
    return options.learning_rate * min(1.0, (progress.step + 1) / options.warmup) * max(0.0, 1 - spent)


def train_step(
    head: Eagle3Head,
    target: Target,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    mask: Tensor,
    unembedding: Tensor,
    draft_steps: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """One optimizer step on ids int64 and mask bool, both [rows, length] → losses and agreements by draft step."""
    with torch.no_grad():
        features, final = target.forward(ids)
    labels = make_labels(final, mask, unembedding)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        losses, agreements = unroll(head, target, features, ids, labels, unembedding, draft_steps)
    optimizer.zero_grad(set_to_none=True)
    weighted(losses).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()
    return [loss.detach() for loss in losses], agreements


def checkpoint(
    head: Eagle3Head,
    target: Target,
    optimizer: torch.optim.Optimizer,
    progress: TrainingState,
    options: argparse.Namespace,
) -> None:
    """The head for users, and all that a later run needs."""
    save_head(head, target, options.output)
    tensors = {f"head.{name}": tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    for name, parameter in head.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().cpu()
    metadata = {"step": str(progress.step), "tokens": str(progress.tokens), "seconds": str(progress.seconds)}
    replace(options.work / STATE, lambda path: save_file(tensors, path, metadata))


def restore(head: Eagle3Head, optimizer: torch.optim.Optimizer, path: Path) -> TrainingState:
    """Head and optimizer as `checkpoint` left them."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    head.load_state_dict({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head.")})
    for name, parameter in head.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"{key}.{name}"]
            optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    return TrainingState(int(metadata["step"]), int(metadata["tokens"]), float(metadata["seconds"]))


def trim_log(path: Path, step: int) -> None:
    """Drop what a run wrote after its last checkpoint."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        replace(path, lambda beside: beside.write_text("".join(line + "\n" for line in kept)))


if __name__ == "__main__":
    main()
