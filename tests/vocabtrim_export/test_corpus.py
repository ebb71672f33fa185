"""Every form of calibration data is read; everything else is one clear line."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import Document, Message, builtin_corpus, describe_skipped, read_corpus
from vocabtrim_export.calibration.document import MAX_PIECE, cut_text

USER = Message("user", "Hi")
SYSTEM = Message("system", "Be brief.")


def records(tmp_path, *items, name="data.jsonl"):
    path = tmp_path / name
    text = json.dumps(items) if name.endswith(".json") else "\n".join(map(json.dumps, items))
    path.write_text(text, "utf-8")
    return path


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def table(columns, write=pyarrow.parquet.write_table):
    stream = io.BytesIO()
    write(pyarrow.table(columns), stream)
    return stream.getvalue()


def write_arrow_stream(rows, stream):
    with pyarrow.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": " Hi "}, Document("Hi")),
        ({"prompt": "Hi"}, Document("Hi", (USER,))),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, Document("Hi", (USER,))),
        ({"turns": ["Hi", "More"], "category": "x"}, Document("Hi\n\nMore", (USER,))),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
            Document("Be brief.\n\nHi", (SYSTEM, USER)),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}]},
            Document("Hi", (USER,)),
        ),
        (
            # As ShareGPT has them: the answer of a cut-off exchange first.
            {"conversations": [{"from": "gpt", "value": "Yes."}, {"from": "human", "value": "Hi"}]},
            Document("Yes.\n\nHi", (USER,)),
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": []}]},
            Document("Hi", (USER,)),
        ),
        (
            {"messages": [{"role": "User", "content": "Hi"}, {"role": "model", "content": "Yes."}]},
            Document("Hi\n\nYes.", (USER,)),
        ),
        ("Hi", Document("Hi", (USER,))),
        ([{"role": "user", "content": "Hi"}], Document("Hi", (USER,))),
        ({"prompt": "Hi", "completion": "Yes."}, Document("Hi\n\nYes.", (USER,))),
        ({"prompt": "Hi", "completion": 3}, Document("Hi\n\n3", (USER,))),
        ({"question": "Hi", "answer": 0.5}, Document("Hi\n\n0.5", (USER,))),
        ({"question": "Hi", "answer": float("nan")}, Document("Hi", (USER,))),
        ({"question": "Hi", "answer": "Yes."}, Document("Hi\n\nYes.", (USER,))),
        ({"instruction": "Hi", "input": "", "output": "Yes."}, Document("Hi\n\nYes.", (USER,))),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            Document("Add.\n\n1, 2\n\n3", (Message("user", "Add.\n\n1, 2"),)),
        ),
        (
            {"instruction": "Add.", "context": "1, 2", "response": "3"},  # as Dolly has them
            Document("Add.\n\n1, 2\n\n3", (Message("user", "Add.\n\n1, 2"),)),
        ),
        (
            {
                "custom_id": "1",
                "method": "POST",
                "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
            },
            Document("Hi", (USER,)),
        ),
    ],
)
def test_a_record_becomes_a_document(tmp_path, name, record, document):
    assert read_corpus([records(tmp_path, record, name=name)]).documents == (document,)


def test_empty_records_among_others_are_passed_over(tmp_path):
    path = records(tmp_path, {"conversations": []}, {"text": "Hi"}, {"prompt": " "})
    assert read_corpus([path]).documents == (Document("Hi"),)


def test_a_conversation_in_which_no_user_speaks_is_named(tmp_path):
    parts = [{"type": "input_text", "text": "Hi"}]  # as OpenAI's Responses have them
    roles = {"messages": [{"role": "customer", "content": "Hello"}]}, {"messages": [{"role": "user", "content": parts}]}
    corpus = read_corpus([records(tmp_path, *roles)])
    assert [document.text for document in corpus.documents] == ["Hi"]
    assert "line 1: no message in it is a user's: their roles are customer" in describe_skipped(corpus.skipped)


def test_unusual_characters_survive(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\\ud800 a lone surrogate"}\r\n{"text": "one\xe2\x80\xa8record"}\r\n')
    assert read_corpus([path]).documents == (Document("? a lone surrogate"), Document("one\u2028record"))


def test_a_directory_is_read_in_order_whoever_lists_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in [("b.txt", "B"), ("sub/a.md", "A"), (".git/x", "X"), ("empty.py", ""), ("a.txt", "\ufeffC")]:
        (tmp_path / name).write_text(text, "utf-8")
    corpus = read_corpus([tmp_path, tmp_path / "b.txt"])
    assert [document.text for document in corpus.documents] == ["C", "B", "A"]
    assert corpus.digest == read_corpus([tmp_path]).digest != read_corpus([tmp_path / "b.txt"]).digest


def test_a_long_text_is_cut_where_it_pauses_and_loses_nothing():
    text = "\n\n".join(" ".join(["word"] * (17 * number)) for number in range(1, 60)) + "x" * 5000
    pieces = list(cut_text([text]))
    assert all(0 < len(piece) <= MAX_PIECE for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_the_built_in_corpus_stands_in():
    assert read_corpus([]) == builtin_corpus()
    assert builtin_corpus().source == "built-in (pydoc_data.topics)"
    assert len(builtin_corpus().documents) > 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: no usable text"),
        ("a.txt", b" \n", "a.txt: no usable text"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-16 as its first bytes say"),
        ("a.txt", "na\u00efve".encode("latin1"), r"a.txt is not UTF-8 text \(byte 2\): convert it \(iconv"),
        ("a.txt", "text, né".encode("utf-16-le"), r"a.txt seems to be UTF-16 .*iconv -f utf-16le -t utf-8"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-be"), r"a.jsonl seems to be UTF-16 .*iconv -f utf-16be -t utf-8"),
        ("a.txt", b"text\0", "a.txt is not text, it holds NUL bytes"),
        ("a.tar.gz", gzip.compress(b"a.txt" + bytes(600), mtime=0), "a.tar.gz is a tar archive, .*: unpack it"),
        ("a.tgz", gzip.compress(b"a.txt" + bytes(600), mtime=0), "a.tgz is a tar archive"),
        ("a.jsonl.lzma", b"]\0\0\x80", "a.jsonl.lzma is compressed by a program, which is not read: decompress it"),
        (
            "a.gz",
            gzip.compress(gzip.compress(b"text", mtime=0), mtime=0),
            "a.gz is compressed twice: decompress it once",
        ),
        ("a.bin", b"\xd0\xcf\x11\xe0", "a.bin is an old office document"),
        ("a.gguf", b"GGUF\3", "a.gguf is a file of weights or token counts, .*: give text, or token"),
        ("a.log", b'{"prompt": "hi"}\n', r"a\.log holds JSON lines, .* rename it to \.jsonl"),
        ("a.jsonl.1", b'{"prompt": "hi"}\n', r"a\.jsonl\.1 holds JSON lines"),
        ("a.gz", gzip.compress(b'{"prompt": "hi"}\n', mtime=0), r"a\.gz holds JSON lines"),
        (
            "a.csv",
            b'prompt,response\nHi,"open\nHow,so\n',
            "a.csv is not a table of .csv .*unexpected end of data, at l",
        ),
        ("a.tsv", b'text\tn\n"Hi" he said\t1\n', "a.tsv is not a table of .tsv .*at line 1.: a cell that begins"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', "a.jsonl, line 2 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "a.jsonl, line 3 is not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\xc3',
            r"a.jsonl, line 2 is not UTF-8 text \(byte 10\): get it again if",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "a.jsonl, line 2 is not valid JSON"),
        ("a.parquet", table({"text": pyarrow.array([], pyarrow.string())}), "a.parquet: no usable text"),
        ("a.parquet", table({}), "a.parquet: no usable text"),
        ("a.arrow", table({"data": [{"text": "x"}]}, write_arrow_stream), "it has data"),
        (
            "a.arrow",
            table({"prompt": [{"messages": ["x"]}]}, write_arrow_stream),
            "`prompt` must be a list, not object",
        ),
        ("a.jsonl", b'\n{"text": ""}', "a.jsonl, line 2: no usable text"),
        ("a.jsonl", b'{"output": "y"}', "a.jsonl, line 1: a record needs one of the fields .* it has output"),
        ("a.csv", b"prompt,response\na,b,c\n", "a.csv, line 2 has more cells than the header"),
        ("a.parquet", table({"text": [b"x"]}), "row 1, text: expected text, got bytes"),
        ("a.csv", b"sentence,label\nHi,1\n", "a.csv, line 2: a record needs one of the fields .* sentence, label"),
        ("a.txt.zst", zstd(b"text" * 99)[:-3], "a.txt.zst is damaged, it cannot be decompressed"),
        ("a.zst", b"text", "a.zst is not .zst data"),
        ("a.parquet", b"text", "a.parquet is not .parquet data"),
        ("a.parquet", b"PAR1\x00", "a.parquet is a Parquet table that cannot be read"),
        ("a.txt", b"PAR1\x00", "a.txt is a Parquet table that"),
        ("a.arrow", b"ARROW1\0\0", "a.arrow is an Arrow table that cannot be read"),
        ("a.arrow", b"\xff" * 9, "a.arrow is an Arrow table that cannot be read"),
        ("a.parquet", table({"n": [1], "label": ["x"]}), "row 1: a record needs one of .* it has n, label"),
        ("a.parquet", table({"n": [1], "image": [b"x"]}), "row 1: a record needs one of .* it has n, image"),
        ("a.txt", b'{"prompt": "hi"}\n', r"a\.txt holds JSON lines, .* rename it to \.jsonl"),
        ("a.gz", gzip.compress(b"PK\x03\x04 ", mtime=0), "a.gz is a zip archive"),
        ("a.gz", b"text", "a.gz is not .gz data"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-12], "a.jsonl.gz is damaged"),
        ("a.txt.xz", lzma.compress(b"x" * 999)[:40], "a.txt.xz is damaged"),
        ("a.txt.bz2", b"BZh9" + bytes(20), "a.txt.bz2"),
        ("a.jsonl", b'{"text": 3}', "line 1, text: expected text, got int"),
        ("a.jsonl", b"3", "line 1: expected an object"),
        ("a.jsonl", b'{"turns": "x"}', "line 1: `turns` must be a list"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}', r"line 1, messages\[0\]: a message needs `role`"),
        ("a.jsonl", b'{"messages": [3]}', r"line 1, messages\[0\]: expected a message"),
        (
            "a.jsonl",
            b'{"request": {"prompt": "x"}, "response": {"choices": [{"message": "y"}]}}',
            "line 1: the response of recorded traffic needs `choices`, as OpenAI's has",
        ),
        ("a.json", b'[{"text": "x"},\n{]', r"a.json is not valid JSON \(at line 2\)"),
        ("a.json", b"[{}]", "a.json, record 1: a record needs"),
        ("a.json", b"[" * 100_000, "a.json is not valid JSON"),
    ],
)
def test_bad_data_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VocabtrimError, match=message) as error:
        read_corpus([tmp_path / name])
    assert "\n" not in str(error.value)


def test_a_missing_path_and_an_empty_directory_are_named(tmp_path):
    with pytest.raises(VocabtrimError, match=r"not found: .*nowhere"):
        read_corpus([tmp_path / "nowhere"])
    with pytest.raises(VocabtrimError, match="no calibration files in the directory"):
        read_corpus([tmp_path])


def test_a_pipe_is_told_from_a_missing_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VocabtrimError, match=r"pipe is no file or directory but a pipe .*: write the data to a file"):
        read_corpus([tmp_path / "pipe"])


def test_a_line_of_absurd_length_is_refused_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr("vocabtrim_export.calibration.text_files.MAX_LINE", 1000)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "short"}\n{"text": "' + "x" * 1000 + '"}\n')
    with pytest.raises(VocabtrimError, match="line 2 is longer than"):
        read_corpus([path])


def test_a_record_of_no_known_form_is_left_out_and_named(tmp_path):
    corpus = read_corpus([records(tmp_path, {"text": "x"}, {"output": "y"}, 3, {"prompt": "z"})])
    assert [document.text for document in corpus.documents] == ["x", "z"]
    assert [each.where.rpartition("/")[2] for each in corpus.skipped] == ["data.jsonl, line 2", "data.jsonl, line 3"]
    line = describe_skipped(corpus.skipped)
    assert line.startswith("2 records were skipped: ")
    assert "line 2: a record needs one of" in line
    assert "\n" not in line


SUFFIXES = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz", zstd: ".zst"}


@pytest.mark.parametrize("compress", SUFFIXES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "né\u2028"}\n{"prompt": "b"}\n'),
        ("a.json", '[{"prompt": "né\u2028"}, {"prompt": "b"}]'),
        ("a.json", '{"prompt": "né\u2028"}\n{"prompt": "b"}\n'),
        ("a.csv", 'id,prompt\n1,"né\u2028"\n2,b\n'),
        ("a.csv", 'id;prompt\r\n1;"né\u2028"\r\n2;b\r\n'),
        ("a.tsv", "id\tprompt\n1\tné\u2028\n2\tb\n"),
        ("a.csv", "ID, Prompt\n1,né\u2028\n2,b\n"),
        ("a.jsonl", '[{"prompt": "né\u2028"}, {"prompt": "b"}]\n'),
    ],
)
def test_every_format_compression_and_encoding_reads_alike(tmp_path, name, text, encoding, compress):
    path = tmp_path / (name + SUFFIXES[compress])
    path.write_bytes(compress(text.encode(encoding)))
    found = read_corpus([path]).documents
    assert [document.prompt for document in found] == [(Message("user", "né\u2028"),), (Message("user", "b"),)]


def test_a_table_of_one_column_is_not_cut_at_commas(tmp_path):
    (tmp_path / "a.csv").write_text('text\nHi, you\n"and, you"\n')
    assert [document.text for document in read_corpus([tmp_path / "a.csv"]).documents] == ["Hi, you", "and, you"]


def test_a_cell_of_a_table_may_hold_a_conversation(tmp_path):
    (tmp_path / "a.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""Hi""}]"\n')
    assert read_corpus([tmp_path / "a.csv"]).documents == (Document("Hi", (USER,)),)


@pytest.mark.parametrize("compress", SUFFIXES)
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", pyarrow.parquet.write_table),
        ("a.feather", pyarrow.feather.write_feather),
        ("a.arrow", write_arrow_stream),
    ],
)
def test_tables_of_arrow_are_read_as_their_rows(tmp_path, name, write, compress):
    path = tmp_path / (name + SUFFIXES[compress])
    hi = {"role": "user", "content": "Hi"}
    columns = {
        "id": [1, 2, 3, 4, 5],
        "image": [b"x"] * 5,
        "messages": [[hi], None, None, None, []],
        "prompt": pyarrow.array([None, "b", json.dumps([hi]), None, None]).dictionary_encode(),
    }
    path.write_bytes(compress(table(columns, write)))
    corpus = read_corpus([path])
    assert [document.prompt for document in corpus.documents] == [(USER,), (Message("user", "b"),), (USER,)]
    assert not corpus.skipped


def test_a_table_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, data, what in [
        ("a.parquet", b"PAR1\0", "a Parquet table"),
        ("a.zst", zstd(b"x"), "compressed with zstd"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VocabtrimError, match=rf"{what}, which needs pyarrow: pip install 'vocabtrim-export\[data"):
            read_corpus([tmp_path / name])


def test_a_file_may_hold_one_conversation(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]')
    assert read_corpus([path]).documents == (Document("Hi\n\nYes.", (USER,)),)
