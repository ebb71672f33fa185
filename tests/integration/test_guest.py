"""Our libraries as guests of somebody's program: what belongs to the process stays as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx

ROOT = Path(__file__).parents[2]

# Reads a model, calibrates, exports and generates, and compares the process before and after.
PROGRAM = """
import json, logging, os, random, signal, sys, warnings
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
    }

transformers.utils.logging.get_logger("transformers")  # transformers sets its own level when it is first asked
before, sessions = process_state(), [plain_session()]
import engines, runtime, vocabtrim_export
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.pipeline import export
from vocabtrim_export.settings import ExportSettings

calibration = CalibrationSettings((text,), calibration_tokens=64)
result = export(str(model), str(model), output, ExportSettings(k=192, max_length=64, calibration=calibration))
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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_a_program_is_left_as_it_was(random_model, tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "bystander", [x], [y])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "bystander.onnx")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 9)
    found = run(PROGRAM, random_model("llama"), tmp_path / "text.txt", tmp_path / "out", tmp_path / "bystander.onnx")
    assert json.loads(found) == {"changed": [], "sessions": [[-1.0] * 3] * 3}


def test_engines_use_the_global_thread_pool_of_a_program_that_has_one(random_model, export_pair):
    result = export_pair(random_model("llama"))
    assert run(GLOBAL_POOL, result.target, result.drafter) == "True"
