"""Block efficiency of a head: greedy chains of drafts from every position at once, then rounds walked over them.

A draft/verify loop meets only some positions, but what it drafts at one depends on the accepted text alone. So all
chains are drafted in parallel along the target's greedy answer, and the rounds are read off exactly.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from generate import read_prompts
from model import Eagle3Head, Past, head_from_target, load_head, replace
from sampling import Limits, Rows, Sequence, generate
from target import Target, pick_device
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--target", type=Path, required=True, help="Hugging Face directory of the target")
    parser.add_argument("--head", type=Path, help="directory of the head; without it, one that was never trained")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="JSONL with turns; the first ones are asked"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, default=10**9, help="prompts of each file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    device = pick_device()
    target = Target.load(options.target, device, getattr(torch, options.dtype))
    head = (load_head(options.head, target) if options.head else head_from_target(target)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    results = {"draft_length": options.draft_length, "max_new_tokens": options.max_new_tokens, "dtype": options.dtype}
    results["sets"] = {}
    for file in options.prompts:
        start = time.monotonic()
        prompts = read_prompts([file], tokenizer, target.sizes.max_positions - options.max_new_tokens)
        if not prompts:
            raise SystemExit(f"{file} holds no prompt that fits the target")
        answers = greedy_answers(target, prompts[: options.limit], options.max_new_tokens)
        accepted = [walk(drafts_right(head, target, one, options.draft_length), one) for one in answers]
        results["sets"][file.stem] = summary(answers, accepted, options.draft_length)
        print(f"{file.stem}: {json.dumps(results['sets'][file.stem])}, {time.monotonic() - start:.0f} s", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    replace(options.output, lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))


def greedy_answers(target: Target, prompts: list[list[int]], new_tokens: int) -> list[Sequence]:
    """The target's own, up to an end token, which counts, or `new_tokens`."""
    rows = Rows.of_prompts(prompts, [0.0] * len(prompts), target.embedding.device)
    length = max(len(prompt) for prompt in prompts) + new_tokens
    return sorted(generate(target, rows, Limits(length, new_tokens)), key=lambda one: one.row)


@torch.no_grad()
def drafts_right(head: Eagle3Head, target: Target, sequence: Sequence, draft_length: int) -> Tensor:
    """bool [length, draft_length]: of the chain drafted once token t + 1 is known, is draft i the text's token
    t + 2 + i? False beyond the end."""
    ids = sequence.tokens.long().to(target.embedding.device)[None]
    features, _ = target.forward(ids)
    return (draft_chains(head, target, features, ids, draft_length) == ahead(ids, draft_length))[0]


def draft_chains(head: Eagle3Head, target: Target, features: Tensor, ids: Tensor, draft_length: int) -> Tensor:
    """int64 [rows, length, draft_length]: drafted tokens from every position, each from the drafts before it.
    features: [rows, length, 3·hidden]. ids: int64 [rows, length]."""
    hidden, past, drafts = head.fc(features.float()), Past(), []
    tokens = F.pad(ids[:, 1:], (0, 1))
    for _ in range(draft_length):
        hidden = head.step(hidden, F.embedding(tokens, target.embedding), past)
        tokens = (head.norm(hidden).to(target.unembedding.dtype) @ target.unembedding.T).argmax(-1)
        drafts.append(tokens)
    return torch.stack(drafts, -1)


def ahead(ids: Tensor, draft_length: int) -> Tensor:
    """int64 [rows, length, draft_length]: the tokens t + 2, t + 3, … at row t, -1 beyond the end."""
    padded = F.pad(ids, (0, draft_length + 1), value=-1)
    return torch.stack([padded[:, 2 + i : 2 + i + ids.shape[1]] for i in range(draft_length)], -1)


def walk(right: Tensor, sequence: Sequence) -> list[int]:
    """Drafts accepted in each round. The prefill gives the first token, each round one more of the target's."""
    accepted = right.cpu().cumprod(-1).sum(-1).tolist()
    rounds, last = [], sequence.answer  # the last known token
    while last < len(sequence.tokens) - 1:
        rounds.append(accepted[last - 1])
        last += rounds[-1] + 1
    return rounds


def summary(answers: list[Sequence], accepted: list[list[int]], draft_length: int) -> dict:
    """tau: tokens gained per target call, prefills and their first tokens not counted. acceptance: entry i is the share
    of rounds in which more than i drafts were accepted."""
    rounds = [count for one in accepted for count in one]
    tokens = sum(len(one.tokens) - one.answer - 1 for one in answers)
    return {
        "prompts": len(answers),
        "tokens": tokens,
        "rounds": len(rounds),
        "tau": round(tokens / len(rounds), 4) if rounds else 0.0,
        "acceptance": [round(sum(n > i for n in rounds) / max(1, len(rounds)), 4) for i in range(draft_length)],
    }


if __name__ == "__main__":
    main()
