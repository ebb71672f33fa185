"""`LogitRules`: penalties, biases and forbidden tokens, applied to the logits after a text and any draft of it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.bundle.manifest import Manifest
from engines.bundle.vocab_map import NOT_KEPT, HeadTokens
from engines.generation_rules import GenerationRules
from engines.sampling_params import SamplingParams

FORBIDDEN = np.float32(-np.inf)


class Columns:
    """The columns of token ids in a head's logits, float32[width]: column i is token i or `kept_token_ids[i]`."""

    def __init__(self, width: int, head_tokens: HeadTokens | None = None) -> None:
        self.width, self._head_tokens = width, head_tokens

    def find(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Returns the columns of those of `ids` that the head has, and which these are: bool[len(ids)]."""
        if self._head_tokens is None:
            has = ids < self.width
            return ids[has], has
        columns, inverse = np.full(len(ids), NOT_KEPT, np.int64), self._head_tokens.inverse
        known = ids < len(inverse)
        columns[known] = inverse[ids[known]]
        has = (columns != NOT_KEPT) & (columns < self.width)
        return columns[has], has

    def spread(self, by_token: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Returns bool[width] of bool[tokens]: the value of each column's token; false for an empty slot."""
        if self._head_tokens is None:
            return by_token[: self.width]
        tokens = self._head_tokens.kept_token_ids[: self.width]
        values: NDArray[np.bool_] = by_token[tokens] & (tokens != NOT_KEPT)
        return values


class LogitRules:
    """Applies a target's generation config and a generation's parameters to logits.

    It holds the text (prompt and output) and the counts that the rules need, so that one more token costs the same
    however long the text is, and a row of logits is touched only where a rule concerns a token.
    """

    def __init__(self, params: SamplingParams, target: Manifest, prompt: Sequence[int]) -> None:
        """Make the rules of a generation.

        Args:
            params: The settings of the generation.
            target: The target's manifest, whose rules apply where `params` give none.
            prompt: Token ids of the prompt.

        Raises:
            VocabtrimError: `params` name tokens that the target lacks.
        """
        params.check_token_ids(target.vocab_size)
        self._rules = rules = params.rules(target.rules)
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._bias_ids = np.array([*params.logit_bias], np.int64)
        self._biases = np.array([*params.logit_bias.values()], np.float32)
        self._eos = np.array(target.eos_token_ids, np.int64)
        words = [word for word in rules.bad_words_ids if not (len(word) == 1 and word[0] in target.eos_token_ids)]
        self._never = np.array([*rules.suppress_tokens, *(word[0] for word in words if len(word) == 1)], np.int64)
        self._words: dict[tuple[int, ...], list[int]] = defaultdict(list)  # by what comes before the last token
        for *start, last in (word for word in words if len(word) > 1):
            self._words[tuple(start)].append(last)
        self._word_lengths = sorted({len(start) for start in self._words})
        self._prompt_length = len(prompt)
        self._text = _Text(rules.no_repeat_ngram_size)
        self._text.extend(prompt, is_output=False)
        self._length = len(prompt)  # of the text; a draft may lie behind it

    def extend(self, tokens: Iterable[int]) -> None:
        """Append what was generated to the text."""
        self._text.truncate(self._length)
        self._text.extend(tokens, is_output=True)
        self._length = len(self._text.tokens)

    def apply(self, row: NDArray[np.float32], draft: Sequence[int], columns: Columns) -> NDArray[np.float32]:
        """Returns the logits after the text and `draft`, as the rules leave them.

        Args:
            row: float32[columns.width], as the model gives them.
            draft: The tokens between the text and the one that `row` predicts.
            columns: The token of each column.

        Returns:
            A new float32[columns.width]; −inf for a token that must not be chosen.
        """
        self._read(draft)
        row = row.copy()
        rules, text = self._rules, self._text
        if len(self._bias_ids):
            at, has = columns.find(self._bias_ids)
            row[at] += self._biases[has]
        if rules.repetition_penalty != 1 or self._presence or self._frequency:
            at, has = columns.find(text.ids)
            row[at] = self._penalised(row[at], text.output_counts[has])
        for forbidden in self._forbidden():
            row[columns.find(np.asarray(forbidden, np.int64))[0]] = FORBIDDEN
        return row

    def _penalised(self, values: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the logits of tokens that the text holds, which the output holds so many times.

        What float32 cannot hold becomes infinite, as in transformers, and nothing becomes NaN.
        """
        penalties = self._frequency * counts.astype(np.float64) + self._presence * (counts > 0)
        with np.errstate(over="ignore"):
            if (factor := np.float32(self._rules.repetition_penalty)) != 1:
                values = np.where(values < 0, values * factor, values / factor)
            return (values - penalties).astype(np.float32)

    def _forbidden(self) -> Iterable[Sequence[int] | NDArray[np.int64]]:
        rules, tokens = self._rules, self._text.tokens
        if len(self._never):
            yield self._never
        if rules.no_repeat_ngram_size:
            yield self._text.repeats()
        for length in self._word_lengths:
            if found := self._words.get(tuple(tokens[-length:])):
                yield found
        if len(tokens) < max(rules.min_length, self._prompt_length + rules.min_new_tokens):
            yield self._eos
        if rules.begin_suppress_tokens and len(tokens) == self._prompt_length:
            yield rules.begin_suppress_tokens

    def _read(self, draft: Sequence[int]) -> None:
        """Let the text end in `draft`; what it has in common with the draft before stays."""
        behind = self._text.tokens[self._length :]
        same = next((i for i, pair in enumerate(zip(behind, draft, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(behind), len(draft)) if same is None else same
        self._text.truncate(self._length + same)
        self._text.extend(draft[same:], is_output=True)


def make_logit_rules(params: SamplingParams, target: Manifest, prompt: Sequence[int]) -> LogitRules | None:
    """Returns the rules of a generation; None where nothing changes the logits.

    Args:
        params: The settings of the generation.
        target: The target's manifest, whose rules apply where `params` give none.
        prompt: Token ids of the prompt, which some rules count.

    Raises:
        VocabtrimError: See `LogitRules`.
    """
    additions = params.presence_penalty, params.frequency_penalty, params.logit_bias
    changes_nothing = GenerationRules(unsupported=target.rules.unsupported)
    if params.rules(target.rules) == changes_nothing and not any(additions):
        return None
    return LogitRules(params, target, prompt)


def ruled_rows(
    rows: NDArray[np.float32],
    tokens: Sequence[int],
    rules: LogitRules | None,
    first: int = 0,
) -> NDArray[np.float32]:
    """Returns the rows of logits along a generation, as `rules` leave them.

    Args:
        rows: float32[n, width]; row i comes after the prompt and the first `first + i` of `tokens`.
        tokens: The tokens generated after the prompt that `rules` hold.
        rules: None changes nothing.
        first: The number of tokens before the first row.
    """
    if rules is None:
        return rows
    columns = Columns(rows.shape[1])
    return np.stack([rules.apply(row, tokens[: first + i], columns) for i, row in enumerate(rows)])


class _Text:
    """Tokens, appended and taken back at the end, with counts of them.

    ids: int64[distinct], the distinct tokens by their first occurrence. output_counts: float32[distinct], how often
    each is in the output.
    """

    def __init__(self, ngram_size: int) -> None:
        self.tokens: list[int] = []
        self._is_output: list[bool] = []
        self._slots: dict[int, int] = {}
        self._counts: list[int] = []  # in prompt and output
        self._ids, self._output_counts = np.zeros(64, np.int64), np.zeros(64, np.float32)
        self._ngram_size = ngram_size
        self._followers: dict[tuple[int, ...], list[int]] = defaultdict(list)  # of each ngram_size - 1 tokens

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._counts)]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        return self._output_counts[: len(self._counts)]

    def extend(self, tokens: Iterable[int], *, is_output: bool) -> None:
        """Append tokens, of the output or of the prompt."""
        for token in tokens:
            slot = self._slots.setdefault(token, len(self._counts))
            if slot == len(self._counts):
                self._add(token)
            self._counts[slot] += 1
            self._output_counts[slot] += is_output
            self.tokens.append(token)
            self._is_output.append(is_output)
            if self._ngram_size and len(self.tokens) >= self._ngram_size:
                self._followers[self._key(len(self.tokens) - 1)].append(token)

    def truncate(self, length: int) -> None:
        """Take back every token after the first `length`."""
        while len(self.tokens) > length:
            if self._ngram_size and len(self.tokens) >= self._ngram_size:
                self._followers[self._key(len(self.tokens) - 1)].pop()
            token = self.tokens.pop()
            slot = self._slots[token]
            self._counts[slot] -= 1
            self._output_counts[slot] -= self._is_output.pop()
            if not self._counts[slot]:  # then it was the last one to come in
                self._counts.pop()
                del self._slots[token]

    def repeats(self) -> Sequence[int]:
        """Returns the tokens that would complete an n-gram which the text has already."""
        if len(self.tokens) + 1 < self._ngram_size:
            return ()
        return self._followers.get(self._key(len(self.tokens)), ())

    def _key(self, end: int) -> tuple[int, ...]:
        return tuple(self.tokens[end + 1 - self._ngram_size : end])

    def _add(self, token: int) -> None:
        if len(self._counts) == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._output_counts = np.concatenate([self._output_counts, np.zeros_like(self._output_counts)])
        self._ids[len(self._counts)], self._output_counts[len(self._counts)] = token, 0
        self._counts.append(0)
