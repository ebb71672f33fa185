"""A calibration that Ctrl-C or SIGTERM stops keeps its counts, and ends with the file of one that nothing stopped.

`test_counts.py` kills runs with -9.
"""

import json
import signal
from contextlib import contextmanager

import pytest

from vocabtrim_export.calibration import TokenCounts, batches
from vocabtrim_export.cli import calibrate_command
from vocabtrim_export.cli.main import main


@pytest.mark.parametrize("source", ["text", "target"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_file_is_that_of_a_run_that_nothing_stopped(
    tmp_path, model, tokenizer, monkeypatch, capsys, number, source
):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(batches, "TEXT_BATCH", 64)
    records = (json.dumps({"text": f"the fox {n} jumps over {n % 13} lazy dogs"}) for n in range(300))
    (tmp_path / "data.jsonl").write_text("\n".join(records))

    def run(name):
        data = ["--target", str(tmp_path / "model"), "--calibration", str(tmp_path / "data.jsonl")]
        how = ["--calibration-source", source, "--calibration-tokens", "3000", "--output", str(tmp_path / name)]
        return main(["calibrate", *data, *how])

    assert run("whole.safetensors") == 0

    @contextmanager
    def stop_at_a_third(_rates):
        yield lambda task, done, _total: signal.raise_signal(number) if task == "calibrate" and done > 1000 else None

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_command, "progress_reporter", stop_at_a_third)
        assert run("stopped.safetensors") == 130
    begun = TokenCounts.load(tmp_path / "stopped.safetensors") if source == "text" else None
    assert begun is None or 1000 < begun.total < 3000
    assert capsys.readouterr().err.endswith("interrupted: nothing half-written was left behind\n")
    assert run("stopped.safetensors") == 0
    assert (tmp_path / "stopped.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
