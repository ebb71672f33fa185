"""Every form of calibration data is counted as a plain loop over its texts counts it, however large it is."""

import bz2
import gzip
import json
import lzma
from itertools import chain

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import CountSettings, Document, Message, calibrate, document_file, read_corpus
from vocabtrim_export.calibration import text_files as readers
from vocabtrim_export.calibration.batches import Batch
from vocabtrim_export.calibration.document import cut_text
from vocabtrim_export.calibration.lookahead import Lookahead

CHAT = [{"role": "user", "content": "fox."}, {"role": "assistant", "content": "\n\ndog"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b c"}]
ROWS = [{"instruction": "Add.", "input": f"1, {n}", "output": f"the\u2028fox {n} naïve"} for n in range(40)]
OUTPUTS = [row["output"] for row in ROWS]
LONG = "\n\n".join(" ".join([f"fox{n}"] * (17 * n)) for n in range(1, 40))
TRAFFIC = [
    {
        "request": {"messages": [*CHAT, {"role": "user", "content": "b"}]},
        "response": {"choices": [{"message": {"content": "the fox"}}]},
    },
    {"request": {"body": {"prompt": "x"}}, "response": {"body": {"choices": [{"text": "y dog"}]}}},
]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def cells(rows, delimiter):
    quoted = [[f'"{value}"' for value in row.values()] for row in rows]
    return "\r\n".join(delimiter.join(each) for each in [rows[0].keys(), *quoted]).encode()


def table(write):
    stream = pyarrow.BufferOutputStream()
    write(pyarrow.table({name: [row[name] for row in ROWS] for name in ROWS[0]}), stream)
    return stream.getvalue().to_pybytes()


def arrow_stream(rows, stream):
    with pyarrow.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows)


# name of the file → its content, and the texts that are counted
FORMS = {
    "text.jsonl": (
        lines({"text": "quick fox."}, {"prompt": "of ", "completion": " fox"}, "dog"),
        ["quick fox.", " fox", "dog"],
    ),
    "chats.json": (
        json.dumps([{"messages": CHAT}, {"conversations": SHARED}, {"turns": ["x", "y"]}]).encode(),
        ["\n\ndog", "b c", "x", "y"],
    ),
    "batch.ndjson": (lines({"custom_id": "1", "body": {"messages": CHAT[:1]}}), ["fox."]),
    "traffic.jsonl": (lines(*TRAFFIC), ["the fox", "y dog"]),
    "alpaca.json": (json.dumps(ROWS, indent=1).encode(), OUTPUTS),
    "lines.json": (lines(*ROWS), OUTPUTS),
    "alpaca.csv": (cells(ROWS, ","), OUTPUTS),
    "alpaca.tsv": (cells(ROWS, "\t"), OUTPUTS),
    "one.csv": (b"text\nfox, and dog\n", ["fox, and dog"]),
    "gsm8k.tsv": (b"question\tanswer\nhow?\tso.\n", ["so."]),
    "alpaca.parquet": (table(pyarrow.parquet.write_table), OUTPUTS),
    "alpaca.feather": (table(pyarrow.feather.write_feather), OUTPUTS),
    "alpaca.arrow": (table(arrow_stream), OUTPUTS),
    "long.txt": (LONG.encode(), [*cut_text([LONG])]),
    "utf16.md": ("né dog".encode("utf-16"), ["né dog"]),
    "alpaca.jsonl.gz": (gzip.compress(lines(*ROWS)), OUTPUTS),
    "alpaca.csv.bz2": (bz2.compress(cells(ROWS, ";")), OUTPUTS),
    "long.txt.xz": (lzma.compress(LONG.encode()), [*cut_text([LONG])]),
    "alpaca.parquet.zst": (pyarrow.compress(table(pyarrow.parquet.write_table), codec="zstd", asbytes=True), OUTPUTS),
}


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Read as large files are: a few bytes at a time, with the documents in a temporary file."""
    if request.param == "large":
        monkeypatch.setattr(readers, "_CHUNK", 7)
        monkeypatch.setattr(readers, "WHOLE_JSON", 5)
        monkeypatch.setattr(document_file, "IN_MEMORY", 0)
    return request.param


@pytest.mark.parametrize("name", FORMS)
def test_counts_equal_a_plain_loop_over_the_texts_of_every_form(tmp_path, tokenizer, name, size):
    content, texts = FORMS[name]
    (tmp_path / name).write_bytes(content)
    corpus = read_corpus([tmp_path / name])
    assert isinstance(corpus.documents, tuple) == (size == "small")
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    for limit in (3, 10**6):
        counts = calibrate(None, tokenizer, corpus, CountSettings("text", max_tokens=limit))
        assert counts.total == min(limit, len(ids))
    assert (counts.counts + counts.held_out).tolist() == np.bincount(ids, minlength=len(tokenizer)).tolist()


def test_a_tree_of_many_forms_is_counted_whole(tmp_path, tokenizer, size):
    for number, (name, (content, _)) in enumerate(FORMS.items()):
        (tmp_path / f"{number % 3}").mkdir(exist_ok=True)
        (tmp_path / f"{number % 3}" / name).write_bytes(content)
    texts = chain.from_iterable(texts for _, texts in FORMS.values())
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    counts = calibrate(None, tokenizer, read_corpus([tmp_path]), CountSettings("text", max_tokens=10**6))
    assert (counts.counts + counts.held_out).tolist() == np.bincount(ids, minlength=len(tokenizer)).tolist()


def test_documents_in_a_file_are_the_documents_in_memory(monkeypatch):
    documents = [
        Document("né\ud83e", (Message("system", "s"), Message("user", "u" * n)), f"line {n}", ("p",) * n, ("a",))
        for n in range(200)
    ]
    in_memory, digest = document_file.kept(iter(documents))
    monkeypatch.setattr(document_file, "IN_MEMORY", 10)
    stored, digest_of_file = document_file.kept(iter(documents))
    assert digest_of_file == digest
    assert in_memory == tuple(documents)
    assert isinstance(stored, document_file.DocumentFile)
    assert list(stored) == documents
    assert (stored[-1], stored[5:9]) == (documents[-1], tuple(documents[5:9]))
    assert document_file.prompt_lengths(stored).tolist() == document_file.prompt_lengths(documents).tolist()
    with pytest.raises(IndexError):
        stored[200]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"}, {"text": }]', "a.json, record 2 is not valid JSON"),
        ("a.json", b'[{"text": "x"}, {"text": "y"}', "a.json, record 3 is not valid JSON"),
        ("a.json", b'[{"text": "x"}, {"text": "\xe9"}]', r"a.json is not UTF-8 text \(byte 26\)"),
        ("a.txt", b"0123456789\xc3\xa9 \xe9", r"a.txt is not UTF-8 text \(byte 13\)"),
        ("a.txt", b"0123456789\0", "a.txt is not text, it holds NUL bytes"),
        ("a.csv", b"text\nHi\n\xe9\n", r"a.csv is not UTF-8 text \(byte 8\)"),
        ("a.csv", b"text\n" + b"x" * 99, "a.csv has a line that is longer than"),
    ],
)
@pytest.mark.parametrize("size", ["large"], indirect=True)
def test_large_files_that_are_bad_are_one_clear_line(tmp_path, monkeypatch, name, content, message, size):
    monkeypatch.setattr(readers, "MAX_LINE", 50)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VocabtrimError, match=message):
        read_corpus([tmp_path / name])


class Work:
    """A batch's work, which says whether it was asked for."""

    def __init__(self, batch):
        self.batch, self.state = batch, "begun"

    def result(self):
        self.state = "asked for"
        return self.batch

    def cancel(self):
        self.state = "dropped"


def test_work_on_a_batch_that_was_guessed_wrong_is_dropped():
    guesses = {0: [Batch(0, (1,)), Batch(0, (2,))], 1: [Batch(0, (3,))]}

    class Guessed:
        def likely_after(self, batch, documents_done, tokens):
            return iter(guesses[documents_done])

    works = []
    lookahead = Lookahead(Guessed(), lambda batch: works.append(Work(batch)) or works[-1], ahead=2)
    assert [lookahead.tokens(Batch(0, (n,)), n, 0) for n in (0, 1)] == [Batch(0, (0,)), Batch(0, (1,))]
    assert [(work.batch.indices[0], work.state) for work in works] == [
        (0, "asked for"),
        (1, "asked for"),
        (2, "dropped"),
        (3, "begun"),
    ]
