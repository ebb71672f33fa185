"""Training data for an EAGLE-3 head: conversations of the target with itself, and its answers to given prompts.

For most rows the target writes the user's message, too, after the chat template's opening (Magpie). Half the answers
are greedy, half sampled. A shard is written after each batch; a later run adds shards.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from data import Shard, read_shards
from model import replace
from safetensors.torch import save_file
from sampling import Limits, Rows, Sequence, generate
from target import Target, pick_device
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MARK = "MESSAGE"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--target", type=Path, required=True, help="Hugging Face directory of the target")
    parser.add_argument("--work", type=Path, required=True, help="directory for the shards")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="JSONL with turns, or ShareGPT JSON")
    parser.add_argument("--minutes", type=float, default=2.5, help="time for generation")
    parser.add_argument("--max-tokens", type=int, default=10**9, help="stop at so many tokens of answers")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--max-answer", type=int, default=384)
    parser.add_argument("--max-message", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = pick_device()
    deadline = time.monotonic() + 60 * options.minutes
    target = Target.load(options.target, device, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    prompts = read_prompts(options.prompts, tokenizer, options.max_length - 64)
    options.work.mkdir(parents=True, exist_ok=True)
    shards = read_shards(options.work, target.digest)
    seen = {key for shard in shards for key in shard.openings()}
    tokens, index = sum(int(shard.mask.sum()) for shard in shards), len(shards)
    limits = Limits(options.max_length, options.max_answer, options.max_message, deadline, stragglers=0.05)
    while time.monotonic() < deadline and tokens < options.max_tokens:
        torch.manual_seed(options.seed * 10_000 + index)
        start = time.monotonic()
        rows, messages = make_rows(tokenizer, prompts, options.batch, index, device)
        made = list(generate(target, rows, limits))
        kept = select(made, messages, tokenizer, seen)
        if kept:
            save(kept, target.digest, options.work / f"shard_{index:04d}.safetensors")
        index, new = index + 1, sum(len(one.tokens) - one.answer for one in kept)
        tokens += new
        rate = new / (time.monotonic() - start)
        print(f"batch {index}: {len(kept)} of {options.batch} kept, {tokens} answer tokens, {rate:.0f}/s", flush=True)


def opening(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns the chat template's text before a user's only message, and between the message and the answer."""
    messages = [{"role": "user", "content": MARK}]
    before, after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split(MARK)
    return before, after


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def chat(tokenizer: PreTrainedTokenizerBase, messages: list[str]) -> list[list[int]]:
    """Token ids of one-turn conversations, up to where the answer starts."""
    before, after = opening(tokenizer)
    return encode(tokenizer, [before + message + after for message in messages])


def read_prompts(files: list[Path], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[list[int]]:
    """First turns of all files, once each, as token ids; those above `longest` are left out."""
    messages: dict[str, None] = {}
    for file in files:
        text = file.read_text()
        entries = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for entry in entries:
            if "turns" in entry:
                messages[entry["turns"][0]] = None
            elif entry.get("conversations") and entry["conversations"][0]["from"] == "human":
                messages[entry["conversations"][0]["value"]] = None
            elif "prompt" in entry:
                messages[entry["prompt"]] = None
    return [ids for ids in chat(tokenizer, list(messages)) if len(ids) <= longest]


def make_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], batch: int, index: int, device: torch.device
) -> tuple[Rows, int]:
    """The batch with this index, and how many of its rows, the first ones, write their own message. At most an eighth
    are given prompts: greedy once, sampled from then on."""
    chance = random.Random(index)
    given = chance.sample(prompts, min(len(prompts), batch // 8))
    before, after = encode(tokenizer, list(opening(tokenizer)))
    if after[0] != tokenizer.eos_token_id:
        raise SystemExit("the chat template does not end a user's turn with the tokenizer's EOS token")
    messages = batch - len(given)
    # half of the answers greedy, half sampled
    temperature = [0.0 if row % 2 else chance.uniform(0.7, 1.0) for row in range(messages)]
    temperature += [chance.uniform(0.7, 1.0) if index else 0.0 for _ in given]
    rows = Rows.of_prompts([before + after] * messages + given, temperature, device)
    rows.gap[:messages] = len(before)
    return rows, messages


def select(made: list[Sequence], messages: int, tokenizer: PreTrainedTokenizerBase, seen: set[bytes]) -> list[Sequence]:
    """Without messages that were `seen` (adds to it), that hold special tokens, or that the tokenizer would have cut
    into other tokens: a real prompt never has those."""
    before, after = encode(tokenizer, list(opening(tokenizer)))
    special = set(tokenizer.all_special_ids)
    written = [one for one in made if one.row < messages]
    bodies = [one.tokens[len(before) : one.answer - len(after)].tolist() for one in written]
    again = chat(tokenizer, [tokenizer.decode(body, clean_up_tokenization_spaces=False) for body in bodies])
    kept = [one for one in made if one.row >= messages]
    for one, body, ids in zip(written, bodies, again, strict=True):
        key = one.tokens[: one.answer].numpy().tobytes()
        if key not in seen and not special & set(body) and ids == one.tokens[: one.answer].tolist():
            seen.add(key)
            kept.append(one)
    return kept


def save(sequences: list[Sequence], digest: str, path: Path) -> None:
    masks = [torch.arange(len(one.tokens)) >= one.answer for one in sequences]
    shard = Shard(
        torch.cat([one.tokens for one in sequences]),
        torch.tensor([len(one.tokens) for one in sequences], dtype=torch.int32),
        torch.cat(masks).to(torch.uint8),
    )
    tensors = {"tokens": shard.tokens, "lengths": shard.lengths, "loss_mask": shard.mask}
    replace(path, lambda beside: save_file(tensors, beside, {"target_digest": digest}))


if __name__ == "__main__":
    main()
