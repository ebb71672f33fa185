"""`CalibrationRun`: the settings of one calibration, and how far it came."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """The settings of one calibration, and how far it came. Two runs of equal settings count exactly the same tokens.

    Attributes:
        source: "drafter" or "target" (tokens sampled from that model), or "text".
        corpus_digest: sha256 over the corpus.
        seed: Seed of the random numbers that tokens were drawn with.
        model_digest: Identifies the model's weights; "" for "text".
        dtype: The model's dtype; "" for "text".
        temperature: 0 is greedy; 0 for "text", too.
        batch_size: Prompts of a batch; 0 for "text".
        max_prompt_tokens: Tokens that are kept of a prompt; 0 for "text".
        max_new_tokens: Tokens that are generated for a prompt; 0 for "text".
        chat: The chat template's name and arguments as JSON, "" for the tokenizer's own without arguments.
        corpus: The name of the corpus.
        documents_done: Documents counted so far, those of second and later passes over the corpus included.
        next_done: Tokens counted of the document after these, which the limit cut.
        tokens: Tokens counted so far.
        enough_for: The rows of a head, a number or a share, that `auto` found these tokens to be enough for; "" where
            it did not stop the counting.
        domain: The name of the data among several domains; "" without domains.
        weight: The domain's share of the mixture, relative to the others' weights.
    """

    source: str
    corpus_digest: str
    seed: int
    model_digest: str = ""
    dtype: str = ""
    temperature: float = 0.0
    batch_size: int = 0
    max_prompt_tokens: int = 0
    max_new_tokens: int = 0
    chat: str = ""
    corpus: str = field(default="", compare=False)
    documents_done: int = field(default=0, compare=False)
    next_done: int = field(default=0, compare=False)
    tokens: int = field(default=0, compare=False)
    enough_for: str = field(default="", compare=False)
    domain: str = field(default="", compare=False)
    weight: float = field(default=0.0, compare=False)
