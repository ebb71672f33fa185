"""Calibration on a Ray cluster: the file is that of one process, whoever counts and whoever dies."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import TokenCounts, calibrate, ray_cluster, ray_workers
from vocabtrim_export.calibration.counter import NOBODY, Listener
from vocabtrim_export.calibration.counting import CalibrationSettings, calibrate_models
from vocabtrim_export.calibration.partial_batch import PartialBatch
from vocabtrim_export.cli import calibrate_command
from vocabtrim_export.cli.main import main

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.cluster
STORE = 80 << 20  # bytes: the least that Ray takes


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one core each, as processes of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        made = cluster_utils.Cluster()
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=STORE, include_dashboard=False)
        yield made.address
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def place(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = (json.dumps({"text": f"the fox {n} jumps over {n % 13} lazy dogs"}) for n in range(1000))
    (tmp_path / "data.jsonl").write_text("\n".join(records))
    return tmp_path


def count(place, name, listener=NOBODY, **settings):
    output = place / f"{name}.safetensors"
    settings = CalibrationSettings((str(place / "data.jsonl"),), **settings)
    calibrate_models(None, str(place / "model"), output, settings, listener)
    return output.read_bytes()


@pytest.mark.parametrize("tokens", [10_001, "auto"])
def test_the_file_is_that_of_one_process(cluster, place, tokens):
    settings = {"calibration_source": "text", "calibration_tokens": tokens}
    assert count(place, "ray", **settings, ray=cluster) == count(place, "one", **settings)


@pytest.mark.parametrize("source", ["text", "target"])
def test_a_worker_that_is_killed_at_work_changes_nothing(cluster, place, monkeypatch, source):
    """The worker that gets a model's batch goes on where the dead one was saved last."""
    begin, append, stored = ray_workers._Work._begin, PartialBatch.append, PartialBatch.stored
    begun, processes, at_work, killed, saved = [], {}, {}, [], []

    def begin_and_kill(work):
        for actor in work.workers.actors if not processes else ():
            processes[actor] = ray.get(actor.__ray_call__.remote(lambda _worker: os.getpid()))
        begin(work)
        begun.append(work.batch.batch)
        if source == "target":
            at_work[work.unfinished.key] = work.actor
        elif len(begun) == 3:
            os.kill(processes[work.actor], signal.SIGKILL)

    def append_and_kill(unfinished, segment):
        append(unfinished, segment)
        if unfinished.count == 3 and not killed:
            killed.append(processes[at_work[unfinished.key]])
            os.kill(killed[0], signal.SIGKILL)

    def stored_and_noted(unfinished):
        saved.append([*stored(unfinished)])
        return saved[-1]

    monkeypatch.setattr(ray_workers._Work, "_begin", begin_and_kill)
    monkeypatch.setattr(PartialBatch, "append", append_and_kill)
    monkeypatch.setattr(PartialBatch, "stored", stored_and_noted)
    monkeypatch.setattr(ray_workers, "_ASIDE", 0.0)
    monkeypatch.setattr(ray_workers, "_FETCH", 0.01)
    settings = {"calibration_source": source, "calibration_tokens": 10**7 if source == "text" else 9_000}
    counts = count(place, "ray", **settings, ray=cluster)
    monkeypatch.undo()
    assert len(begun) > len(set(begun))  # some were given out twice
    assert source == "text" or max(map(len, saved)) >= 3
    assert counts == count(place, "one", **settings)
    assert not (place / "ray.safetensors.partial").exists()


def stopped_driver(arguments, number):
    """Run `calibrate`, which the signal ends in the middle: of a batch where a model generates, else of the text.

    Returns its exit code. It is also the program of a process of its own, for the signal that nobody can catch.
    """
    append = PartialBatch.append

    def append_and_stop(unfinished, segment):
        append(unfinished, segment)
        if unfinished.count == 3:
            signal.raise_signal(number)

    @contextmanager
    def stop_at_a_third(_rates):
        yield lambda task, done, _total: signal.raise_signal(number) if task == "calibrate" and done > 5000 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialBatch, "append", append_and_stop)
        patch.setattr(calibrate_command, "progress_reporter", stop_at_a_third)
        patch.setattr(ray_workers, "_ASIDE", 0.0)
        patch.setattr(ray_workers, "_FETCH", 0.01)
        patch.setitem(calibrate.__kwdefaults__, "save_seconds", 0.0)
        return main(arguments)


@pytest.mark.parametrize(
    ("number", "source"), [(signal.SIGINT, "text"), (signal.SIGTERM, "text"), (signal.SIGKILL, "target")]
)
def test_a_driver_that_is_stopped_while_workers_count_goes_on(cluster, place, monkeypatch, number, source):
    """The second run goes on from what the first one saved, and its file is that of one that nothing stopped."""
    settings = {"calibration_source": source, "calibration_tokens": 12_000 if source == "text" else 2_000}
    output = place / "ray.safetensors"
    arguments = ["calibrate", "--target", str(place / "model"), "--calibration", str(place / "data.jsonl")]
    arguments += ["--calibration-source", source, "--calibration-tokens", str(settings["calibration_tokens"])]
    arguments += ["--output", str(output), "--ray", cluster]
    if number == signal.SIGKILL:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, __file__, *arguments]
        assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == -number
    else:
        assert stopped_driver(arguments, number) == 130
    saved = TokenCounts.load(output).total if output.exists() else 0
    segments = sorted(place.glob("ray.safetensors.partial/*/*.safetensors"))
    assert 5000 < saved < 12_000 if source == "text" else len(segments) >= 3

    totals, loaded, stored = [], [], PartialBatch.stored

    def stored_and_noted(unfinished):
        loaded.append([*stored(unfinished)])
        return loaded[-1]

    monkeypatch.setattr(PartialBatch, "stored", stored_and_noted)
    listener = Listener(lambda task, done, _total: totals.append(done) if task == "calibrate" else None)
    counts = count(place, "ray", listener, **settings, ray=cluster)
    assert min(totals) > saved
    assert source == "text" or max(map(len, loaded)) >= 3
    assert counts == count(place, "one", **settings)
    assert not (place / "ray.safetensors.partial").exists()


def test_a_batch_that_every_worker_dies_of_is_one_line(cluster, place, monkeypatch):
    monkeypatch.setattr(ray_workers.TextWorker, "tokens", lambda _worker, _batch, _work: os._exit(1))
    monkeypatch.setattr(ray_workers, "_ATTEMPTS", 2)
    with pytest.raises(VocabtrimError, match=r"2 Ray workers died at one batch, .*; the counts so far are kept"):
        count(place, "ray", calibration_source="text", calibration_tokens=10**7, ray=cluster)


def test_what_a_worker_raises_is_one_line():
    def told(cause):
        return str(ray_workers._one_line(ray.exceptions.RayTaskError("f", "Traceback\n…", cause)))

    assert told(VocabtrimError("no model at /nowhere")) == "no model at /nowhere"
    assert told(MemoryError("12\nGB")) == "a Ray worker failed: MemoryError: 12 GB"


def test_an_address_that_does_not_answer_is_one_line(place, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [each.getsockname()[1] for each in (silent, gone)]
        gone.close()
        for address, message in [
            (f"127.0.0.1:{ports[0]}", "no Ray cluster answers there .timed out"),
            (f"ray://127.0.0.1:{ports[1]}", "no Ray cluster answers there .*refused"),
            ("head:port", "no Ray cluster answers there"),
            ("head", "give the address of a Ray cluster, such as head:6379"),
        ]:
            with pytest.raises(VocabtrimError, match=f"--ray {address}: {message}"):
                count(place, "ray", calibration_source="text", ray=address)


if __name__ == "__main__":
    stopped_driver(sys.argv[1:], signal.SIGKILL)
