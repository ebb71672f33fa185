"""Programs that people point at a server, `llm` and the harness lm-eval: the texts that they get are `generate`'s."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from runtime import SpeculativeDecoder

helper = pytest.importorskip("tests.serving")
QUESTIONS = ["the quick brown fox", "the lazy dog", "system of tokens"]


@pytest.fixture(scope="module")
def texts(pair):
    """texts(chat, stop) → the answers to QUESTIONS."""
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:

        def answer(chat, stop=()):
            return [decoder.generate(each, max_new_tokens=12, chat=chat, stop=stop).text for each in QUESTIONS]

        yield answer


@pytest.fixture(scope="module")
def server(pair):
    with helper.serving(pair, workers=2) as served:
        yield served


def run(package, *arguments, **environment):
    """Run a package's command; skip where it is not installed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    command = [sys.executable, "-m", package, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_llm_prints_the_text(server, texts, tmp_path):
    model = {"model_id": "ours", "model_name": "tiny", "api_base": f"{server.url}/v1", "api_key_name": "ours"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    (tmp_path / "keys.json").write_text(json.dumps({"ours": helper.KEY}))
    options = ["-m", "ours", "-o", "temperature", 0, "-o", "max_tokens", 12]
    printed = run("llm", QUESTIONS[0], *options, LLM_USER_PATH=str(tmp_path))
    assert printed == texts(chat=True)[0] + "\n"


@pytest.mark.parametrize("chat", [True, False])
def test_lm_eval_scores_the_texts(server, texts, tmp_path, chat):
    until = texts(chat)[0][5:7]  # the harness always gives a stop string
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"question": each}) + "\n" for each in QUESTIONS))
    task = {
        **{"task": "ours", "dataset_path": "json", "test_split": "train", "output_type": "generate_until"},
        **{"dataset_kwargs": {"data_files": str(tmp_path / "documents.jsonl")}},
        **{"doc_to_text": "{{question}}", "doc_to_target": "", "metric_list": [{"metric": "exact_match"}]},
        "generation_kwargs": {"until": [until], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    address = f"base_url={server.url}/v1/{'chat/' if chat else ''}completions,model=tiny,num_concurrent=2"
    model = ["--model", "local-chat-completions" if chat else "local-completions"]
    model += ["--model_args", f"{address},tokenizer_backend=None,tokenized_requests=False"]
    output = ["--log_samples", "--output_path", tmp_path / "out", *(["--apply_chat_template"] if chat else [])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OPENAI_API_KEY": helper.KEY}
    run("lm_eval", "run", *model, "--tasks", tmp_path / "task.yaml", *output, **offline)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    found = {each["doc"]["question"]: each["resps"][0][0] for each in answers}
    assert found == dict(zip(QUESTIONS, texts(chat, [until]), strict=True))


def test_lm_eval_scores_given_answers(server, pair, random_model, tmp_path):
    """The log-likelihood of each answer after its question, and whether it is the greedy one."""
    answers = [" jumps over", " fox", " and the dog"]
    documents = [{"question": each, "answer": answer} for each, answer in zip(QUESTIONS, answers, strict=True)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    task = {
        **{"task": "ours", "dataset_path": "json", "test_split": "train", "output_type": "loglikelihood"},
        **{"dataset_kwargs": {"data_files": str(tmp_path / "documents.jsonl")}},
        **{"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "target_delimiter": ""},
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    address = f"base_url={server.url}/v1/completions,model=tiny,num_concurrent=2,tokenizer={random_model('llama')}"
    output = ["--log_samples", "--output_path", tmp_path / "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OPENAI_API_KEY": helper.KEY}
    command = ["run", "--model", "local-completions", "--model_args", address, "--tasks", tmp_path / "task.yaml"]
    run("lm_eval", *command, *output, **offline)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    with SpeculativeDecoder.load(pair.target) as decoder:
        for row in rows:
            question, answer = row["arguments"]["gen_args_0"].values()
            read, whole = (  # the harness adds no special tokens, unless it is told to
                decoder.tokenizer.backend.encode(text, add_special_tokens=False).ids
                for text in (question, question + answer)
            )
            scores = decoder.prompt_logprobs(whole, 1)[len(read) - 1 :]
            logprob, is_greedy = row["resps"][0][0]
            assert float(logprob) == pytest.approx(sum(entry.logprob for entry in scores), abs=1e-3)
            assert (is_greedy in (True, "True")) == all(entry.token_id == entry.top[0][0] for entry in scores)
