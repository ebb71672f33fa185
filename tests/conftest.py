"""A tiny language model and its tokenizer, made anew: two layers of Llama, a BPE of a few hundred tokens."""

import gc
import os

import pytest
from hypothesis import Phase, settings

# Threads only wait for each other in models of this size, and `make test` has a process for each core. This is set
# before anything loads torch or numpy, and child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.bundles"]


def pytest_configure():
    """Give each of pytest-xdist's workers a core of its own.

    The threads of PyTorch and ONNX Runtime wait for each other by spinning. With two workers on two cores and two
    threads each, an export takes several times as long as with one thread.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items):
    """Run the real weights' tests, which take minutes, first: at the end one worker would wait for the other.

    The tests of one architecture run one after the other, so that few workers have to trace it.
    """

    def place(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return "slow" not in item.keywords, str(parameters.get("architecture", ""))

    items.sort(key=place)


def pytest_collection_finish():
    """Exclude the objects of the imported modules from garbage collection.

    PyTorch and transformers have so many that scanning them takes a third of the time of a trace, which makes enough
    objects of its own to start a scan again and again.
    """
    gc.collect()
    gc.freeze()


# For `tests/mutations`: that a test fails is enough, its smallest example may take minutes to find.
settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.generate))

TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unused_0|>")


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog and the system of tokens " * 20], trainer)
    # As Llama's do, it puts a BOS before plain text; a chat template writes what it wants itself.
    backend.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def model(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=448,  # more rows than the tokenizer has tokens, as many heads are padded
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,  # far from uniform logits: no near-ties
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()
