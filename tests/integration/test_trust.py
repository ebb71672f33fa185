"""A bundle with a swapped, changed or redirected part is refused, and the error names the part."""

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import onnx
import pytest

from engines import VocabMap, VocabtrimError, load_engine, read_bundle
from engines.bundle.atomic_replace import LOCK_NAME, try_lock
from engines.bundle.checks import file_digest
from engines.bundle.manifest import _digest
from engines.bundle.read import check_bundle
from engines.bundle.tokenizer import Tokenizer
from runtime import SpeculativeDecoder
from vocabtrim_export.bundles.output import replacing
from vocabtrim_export.cli.main import export_main, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama")


@pytest.fixture
def drafter(pair, tmp_path):
    return shutil.copytree(pair.drafter, tmp_path / "drafter")


def sign(bundle, **changes):
    """Rewrite the manifest as the exporter would for the files as they are: only what they say inside is left."""
    path = bundle / "vocabtrim.json"
    data = json.loads(path.read_text()) | changes
    for name in data["files"]:
        data["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": file_digest(bundle / name)}
    del data["digest"]
    path.write_text(json.dumps(data | {"digest": _digest(data)}))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap_map(bundle):
    ids = read_bundle(bundle).vocab_map.kept_token_ids.tolist()
    ids[-1] += 1
    (bundle / "vocab_map.safetensors").write_bytes(VocabMap.from_ids(ids, 448).to_bytes())


def swap_tokenizer(bundle):
    """Two tokens change their ids: the file keeps its size."""
    path = bundle / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    first, second = [token for token in vocab if 100 <= vocab[token] < 102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    size = path.stat().st_size
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False))
    assert path.stat().st_size == size


def head_at(bundle):
    """Returns the offset of the first head weight in model.onnx.data."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    (head,) = (tensor for tensor in graph.initializer if "kept" in tensor.name and len(tensor.dims) == 2)
    return int({entry.key: entry.value for entry in head.external_data}["offset"])


BREAKS = {
    "swapped map": (swap_map, r"vocab_map\.safetensors does not match its digest"),
    "swapped tokenizer": (swap_tokenizer, r"tokenizer\.json does not match its digest"),
    "changed weight byte": (
        lambda b: flip(b / "model.onnx.data", 1000),
        r"model\.onnx\.data does not match its digest",
    ),
    "changed graph byte": (lambda b: flip(b / "model.onnx", 300), r"model\.onnx does not match its digest"),
    "truncated file": (lambda b: os.truncate(b / "model.onnx.data", 5000), r"model\.onnx\.data is cut short"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_bundle_is_refused_by_name(name, drafter):
    change, message = BREAKS[name]
    change(drafter)
    with pytest.raises(VocabtrimError, match=message):
        load_engine(drafter)
    assert [check.wrong for check in check_bundle(drafter) if check.wrong and re.search(message, check.wrong)]


def other_map(bundle):
    swap_map(bundle)
    sign(bundle, vocab_map=VocabMap.load(bundle / "vocab_map.safetensors").digest)


def other_tokenizer(bundle):
    swap_tokenizer(bundle)
    sign(bundle, tokenizer=Tokenizer.load(bundle).digest)


def other_table(bundle):
    """The map's file and every digest of it are another's; the graph still turns columns into the old tokens."""
    other_map(bundle)
    path = bundle / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    (entry,) = (entry for entry in graph.metadata_props if entry.key == "vocabtrim.vocab_map")
    entry.value = VocabMap.load(bundle / "vocab_map.safetensors").digest
    onnx.save(graph, path)
    sign(bundle)


RESIGNED = {
    "map": (lambda b: (swap_map(b), sign(b)), "is not the VocabMap"),
    "map and manifest": (other_map, "made for another vocab map"),
    "map, manifest and metadata": (other_table, "the table inside .*is not vocab_map"),
    "tokenizer": (lambda b: (swap_tokenizer(b), sign(b)), "is not the tokenizer"),
    "tokenizer and manifest": (other_tokenizer, "made for another tokenizer"),
    "head": (lambda b: sign(b, head="0" * 64), "made for another head"),
    "model": (lambda b: sign(b, source_digest="0" * 64), "made for another model"),
}


@pytest.mark.parametrize("name", RESIGNED)
def test_parts_that_do_not_belong_together_are_refused_though_all_file_digests_fit(name, drafter):
    change, message = RESIGNED[name]
    change(drafter)
    with pytest.raises(VocabtrimError, match=message):
        load_engine(drafter)


def test_check_finds_other_head_rows(drafter, capsys):
    assert main(["inspect", "--check", str(drafter)]) == 0
    flip(drafter / "model.onnx.data", head_at(drafter))
    sign(drafter)
    assert main(["inspect", "--check", str(drafter)]) == 2
    assert "the head's rows" in capsys.readouterr().err


@pytest.mark.parametrize("location", ["../../../../etc/passwd", "/etc/passwd", "..", "inner/../../x"])
def test_weights_outside_the_bundle_are_not_opened(location, drafter, monkeypatch):
    path = drafter / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    entry = next(e for tensor in graph.graph.initializer for e in tensor.external_data if e.key == "location")
    entry.value = location
    path.write_bytes(graph.SerializeToString())
    sign(drafter)
    monkeypatch.setattr("engines.ort.session.open_session", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(VocabtrimError, match="which is not inside the bundle"):
        load_engine(drafter)


def command(model, counts, output):
    options = {"drafter": model, "target": model, "k": 192, "output": output, "calibration": counts, "max-length": 64}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_a_second_export_into_one_place_is_told_so(model, count_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with try_lock(tmp_path / "out" / LOCK_NAME) as free:
        assert free
        assert export_main(command(model, count_file(model), tmp_path / "out")) == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(VocabtrimError, match="another run"), replacing([tmp_path / "a"]), replacing([tmp_path / "b"]):
        pass


@pytest.mark.parametrize("limit", [10_000, 200_000])  # below the tokenizer's size and above it
def test_a_disk_that_is_full_in_earnest(limit, model, count_file, tmp_path, capsys):
    """The kernel stops every file at a limit, whichever program writes it."""
    arguments = command(model, count_file(model), tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal that comes with it
    try:
        status = export_main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, list(tmp_path.iterdir())) == (2, [])
    assert "error: the disk is full" in capsys.readouterr().err


def test_a_read_only_place(model, count_file, tmp_path, monkeypatch, capsys):
    def refuse(self, *_arguments, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    arguments = command(model, count_file(model), tmp_path / "out")
    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who runs this in CI, may write anywhere
    assert export_main(arguments) == 2
    assert "no permission to write" in capsys.readouterr().err


def test_a_bundle_that_is_deleted_under_its_engine(pair, tmp_path):
    places = [shutil.copytree(path, tmp_path / path.name) for path in (pair.target, pair.drafter)]
    with SpeculativeDecoder.load(*places) as decoder:
        before = decoder.generate([5, 6, 7, 8], max_new_tokens=24).token_ids
        for place in places:
            shutil.rmtree(place)
        assert decoder.generate([5, 6, 7, 8], max_new_tokens=24).token_ids == before


@pytest.mark.parametrize("failing", ["target", "drafter"])
def test_an_engine_that_raises_leaves_the_decoder_usable(failing, pair, monkeypatch):
    with load_engine(pair.target) as target, load_engine(pair.drafter, share_cache_with=target) as drafter:
        decoder = SpeculativeDecoder(target, drafter, None, 3)
        prompts = [5, 6, 7, 8], [9, 10, 11]
        wanted = [decoder.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
        engine = {"target": target, "drafter": drafter}[failing]
        feed = type(engine).feed
        for number in range(6):
            calls = iter(range(100))

            def fail(*arguments, number=number, calls=calls, **options):
                if next(calls) == number:
                    raise RuntimeError("the device is gone")
                return feed(engine, *arguments, **options)

            with monkeypatch.context() as patched:
                patched.setattr(engine, "feed", fail)
                with pytest.raises(RuntimeError, match="device is gone"):
                    decoder.generate(prompts[0], max_new_tokens=20)
            assert [decoder.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts[::-1]] == wanted[::-1]
