"""Our libraries as guests of somebody's program: what belongs to the process stays as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from vocabtrim_export.cli.main import export_main

ROOT = Path(__file__).parents[2]

# Reads a model, calibrates, exports and generates, and compares the process before and after.
PROGRAM = """
import gc, json, logging, os, random, signal, sys, warnings
from pathlib import Path

import numpy, onnxruntime, torch, transformers
import accelerate, sympy.utilities.exceptions  # these set warning filters when they are imported

model, text, output, bystander = map(Path, sys.argv[1:])

def plain_session():
    session = onnxruntime.InferenceSession(bystander, enable_fallback=0)
    return session.run(None, {"x": numpy.ones(3, numpy.float32)})[0].tolist()

def process_state():
    loggers = [logging.getLogger(name) for name in ("", "transformers", "torch", "onnxscript", "huggingface_hub")]
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "warnings": list(map(str, warnings.filters)),
        "loggers": [(each.level, each.disabled, len(each.handlers)) for each in loggers],
        "progress bars": transformers.utils.logging.is_progress_bar_enabled(),
        "signals": str(signal.getsignal(signal.SIGINT)),
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled()],
        "torch's random numbers": torch.get_rng_state().tolist(),
        "other random numbers": [str(random.getstate()), str(numpy.random.get_state())],
        "directory": os.getcwd(),
        "garbage collection": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
    }

transformers.utils.logging.get_logger("transformers")  # transformers sets its own level when it is first asked
before, sessions = process_state(), [plain_session()]
import engines, runtime, vocabtrim_export
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.pipeline import export
from vocabtrim_export.settings import ExportSettings

calibration = CalibrationSettings((text,), calibration_tokens=64)
settings = ExportSettings(k=192, max_length=64, quantize_drafter="int4", calibration=calibration)
result = export(str(model), str(model), output, settings)
with runtime.SpeculativeDecoder.load(result.target, result.drafter) as decoder:
    assert len(decoder.generate([3, 4, 5], max_new_tokens=9).token_ids) > 1
    sessions.append(plain_session())
sessions.append(plain_session())
after = process_state()
changed = [name for name in before if before[name] != after[name]]
print(json.dumps({"changed": changed, "sessions": sessions}))
"""


# A program that has chosen ONNX Runtime's global thread pool, which then all of its sessions must use.
GLOBAL_POOL = """
import sys
import onnxruntime
onnxruntime.set_global_thread_pool_sizes(1, 1)
from runtime import SpeculativeDecoder
with SpeculativeDecoder.load(*sys.argv[1:]) as decoder:
    print(len(decoder.generate([3, 4, 5], max_new_tokens=9).token_ids) > 1)
"""


def run(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def guest(random_model, tmp_path_factory, store):
    """Returns the model and the text that PROGRAM read, the bundles that it wrote, and what it printed."""
    model, text = random_model("llama"), tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 9)

    def make(path):
        x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in "xy")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "bystander", [x], [y])
        opset = onnx.helper.make_opsetid("", 20)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path / "bystander.onnx")
        printed = run(PROGRAM, model, text, path / "out", path / "bystander.onnx")
        return model, text, path / "out", json.loads(printed)

    return store.once("guest", make)[1]


def test_a_program_is_left_as_it_was(guest):
    assert guest[-1] == {"changed": [], "sessions": [[-1.0] * 3] * 3}


def test_the_same_inputs_give_the_same_bytes(guest, tmp_path):
    """This process has hash seeds and imports of its own."""
    model, text, elsewhere, _ = guest
    options = {"drafter": model, "target": model, "k": 192, "max-length": 64, "quantize-drafter": "int4"}
    options |= {"calibration": text, "calibration-tokens": 64, "output": tmp_path / "out"}
    assert export_main([each for name, value in options.items() for each in (f"--{name}", str(value))]) == 0
    trees = [
        {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
        for output in (elsewhere, tmp_path / "out")
    ]
    assert trees[0].keys() == trees[1].keys()
    assert [name for name in trees[0] if trees[0][name] != trees[1][name]] == []


def test_engines_use_the_global_thread_pool_of_a_program_that_has_one(pair):
    assert run(GLOBAL_POOL, pair.target, pair.drafter) == "True"
