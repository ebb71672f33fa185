"""Data sets of the hub: their rows are counted as a plain loop counts them, and what goes wrong is one line."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import CountSettings, calibrate, read_corpus
from vocabtrim_export.calibration.counting import read_calibration

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")

COLUMNS = {
    "id": range(30),
    "problem": [f"the fox {number}" for number in range(30)],
    "solution": [f"lazy dogs of {number}" for number in range(30)],
    "image": [b"\xff\xd8"] * 30,
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A data set "owner/name" with two splits, as the hub's clone of it: the library reads a directory first."""
    place = tmp_path / "owner" / "name" / "data"
    place.mkdir(parents=True)
    for split, rows in (("train", 30), ("test", 10)):
        table = datasets.table.pa.table({name: list(values)[:rows] for name, values in COLUMNS.items()})
        parquet.write_table(table, place / f"{split}-00000.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    return tmp_path


def total(tokenizer, texts):
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return np.bincount(ids, minlength=len(tokenizer)).tolist()


def counted(tokenizer, corpus):
    counts = calibrate(None, tokenizer, corpus, CountSettings("text", 10**6))
    return (counts.counts + counts.held_out).tolist()


def test_rows_are_counted_as_a_plain_loop_counts_them(repository, tokenizer):
    corpus = read_corpus(["hf://owner/name,prompt=problem,completion=solution"])
    assert counted(tokenizer, corpus) == total(tokenizer, COLUMNS["solution"])
    again = read_corpus([Path("hf://owner/name,prompt=problem,completion=solution")])
    assert (again.digest, again.documents[0].where) == (
        corpus.digest,
        "hf://owner/name,prompt=problem,completion=solution, row 1",
    )
    asked = [each.prompt[0].content for each in corpus.documents]
    assert asked != COLUMNS["problem"]  # shuffled
    assert sorted(asked) == sorted(COLUMNS["problem"])
    few = read_corpus(["hf://owner/name,split=test,text=solution,rows=7"])
    assert {each.text for each in few.documents} < set(COLUMNS["solution"][:10])
    assert len(few.documents) == 7


def test_a_data_set_can_be_a_domain(repository):
    domains = read_calibration(
        ["a=hf://owner/name,text=problem", "b=hf://owner/name,split=test,text=problem:2"]
    ).domains
    assert [(each.name, each.weight, len(each.corpus.documents)) for each in domains] == [("a", 1, 30), ("b", 2, 10)]


def test_what_was_saved_to_disk_is_read_from_its_directory(repository, tokenizer):
    rows = datasets.Dataset.from_dict({"text": COLUMNS["solution"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(repository / "saved")
    assert counted(tokenizer, read_corpus([repository / "saved"])) == total(tokenizer, COLUMNS["solution"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://owner/name", "has the columns id, problem, solution, image, and none that is a field .*,text=id"),
        ("hf://owner/name,text=body", "has no column body, its columns are id, problem, solution, image"),
        ("hf://owner/name,words=problem", "words is no field of a record: messages, "),
        ("hf://owner/name,text=problem,split=dev", "has no split dev: choose from train, test"),
        ("hf://owner/name,text=problem,config=x", "cannot read hf://owner/name.*BuilderConfig 'x' not found"),
        ("hf://owner/name,text", "'text' is not one of its options: write hf://OWNER"),
        ("hf://owner/name,rows=0", "a positive number of rows"),
        ("hf://owner/name,text=id", "text: expected text, got int"),
        ("owner/other", "not found: owner/other .a data set of the hub is hf://owner/other"),
    ],
)
def test_what_cannot_be_meant_is_one_line(repository, name, message):
    with pytest.raises(VocabtrimError, match=message) as error:
        read_corpus([name])
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_one_line(repository):
    file = next(repository.rglob("train*.parquet"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(VocabtrimError, match="cannot read hf://owner/name,text=problem: "):
        read_corpus(["hf://owner/name,text=problem"])


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VocabtrimError, match=r"pip install 'vocabtrim-export\[data\]', or give a local file"):
        read_corpus(["hf://owner/name"])


@pytest.fixture
def silent_hub():
    """The address of a hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


READ = """
import sys
from vocabtrim_export.calibration import read_corpus
try:
    print([each.text for each in read_corpus([sys.argv[1]]).documents][:1])
except Exception as error:
    print(type(error).__name__, error)
"""


def read_elsewhere(place, **environment):
    """Run in a process of its own: the library reads its environment when it is imported."""
    command = [sys.executable, "-c", READ, "hf://owner/name,text=problem"]
    paths = {"HF_HOME": str(place / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=place, env={**os.environ, **paths, **environment}, capture_output=True, text=True
    )
    return done.stdout, time.monotonic() - begun


def test_a_hub_that_does_not_answer_is_one_line_within_seconds(tmp_path, silent_hub):
    out, seconds = read_elsewhere(tmp_path, HF_ENDPOINT=silent_hub)
    assert out.startswith("VocabtrimError hf://owner/name,text=problem: the hub does not answer; give local files")
    assert seconds < 30  # 5 of them wait


def test_offline_a_data_set_is_read_from_the_librarys_cache(repository):
    datasets.load_dataset("owner/name", cache_dir=str(repository / "home" / "datasets"))
    (cached,) = (repository / "home" / "datasets").glob("name")
    cached.rename(cached.with_name("owner___name"))  # as it is called when it comes from the hub
    shutil.rmtree(repository / "owner")
    out, _ = read_elsewhere(repository, HF_HUB_OFFLINE="1")
    assert out.startswith("['the fox ")
    shutil.rmtree(repository / "home")
    out, _ = read_elsewhere(repository, HF_HUB_OFFLINE="1")
    assert out.startswith("VocabtrimError cannot read hf://owner/name,text=problem: Couldn't reach")
