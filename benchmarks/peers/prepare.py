"""Makes what `run.py` compares: llama.cpp, and a target in fp32, int8 and int4 in every program's form.

    pip install '.[interop]'
    python benchmarks/peers/prepare.py --model FILE.gguf [--drafter FILE.gguf] [--head DIR] --calibration PATH
        --output DIR

Without `--drafter` the model's own int4 copy drafts. An export that is there already is not made again. DIR gets:

    llama.cpp/                                     the server, see llama_cpp.py
    gguf/target_{F32,Q8_0,Q4_0,Q4_1}.gguf          and drafter_Q4_0.gguf
    full/drafter                                   a drafter with all rows, int4
    {fp32,int8,int4}/pair/{target,drafter}         16,384 rows and 512 slots
    {fp32,int8,int4}/eagle/{target,drafter}        the head, where one was given
    {fp32,int8,int4}/peers/{genai,openvino,hf}     16,384 rows
"""

import argparse
import subprocess
import sys
from pathlib import Path

from llama_cpp import build_programs
from llama_server import CONTEXT

QUANTIZATIONS = {"fp32": "none", "int8": "int8", "int4": "int4"}
PEERS = {"fp32": ("genai", "openvino", "hf"), "int8": ("genai", "openvino"), "int4": ("genai", "openvino")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.gguf", help="the target")
    parser.add_argument("--drafter", type=Path, metavar="FILE.gguf", help="a smaller model of the same tokenizer")
    parser.add_argument("--head", type=Path, metavar="DIR", help="an EAGLE-3 head of the target")
    parser.add_argument("--calibration", required=True, metavar="PATH", help="text, or token counts")
    parser.add_argument("--rows", default="16384", help="rows of the LM head that the trimmed drafter keeps")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at the same time")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    build_programs(options.output / "llama.cpp", options.jobs)
    make_ggufs(options)
    make_bundles(options)


def make_ggufs(options: argparse.Namespace) -> None:
    """Quantise with llama.cpp's own program, all from one file in fp32."""
    directory = options.output / "gguf"
    directory.mkdir(parents=True, exist_ok=True)
    sources = {"target": options.model, "drafter": options.drafter or options.model}
    for name, precision in [("target", name) for name in ("F32", "Q8_0", "Q4_0", "Q4_1")] + [("drafter", "Q4_0")]:
        file, whole = directory / f"{name}_{precision}.gguf", directory / f"{name}_F32.gguf"
        source = whole if whole.exists() else sources[name]
        if not file.exists():
            program = options.output / "llama.cpp" / "bin" / "llama-quantize"
            run([str(program), "--allow-requantize", str(source), str(file), precision, "2"])


def make_bundles(options: argparse.Namespace) -> None:
    root, model = options.output, str(options.model)
    drafter = str(options.drafter or options.model)
    export(root / "full", options, "--drafter", drafter, "--quantize", "int4", "--k", "1000000")
    for name, quantization in QUANTIZATIONS.items():
        both = ("--target", model, "--quantize", quantization, "--quantize-drafter", "int4", "--k", options.rows)
        pair = ("--drafter", drafter, *both)
        export(root / name / "pair", options, *pair, "--slots", "512")
        export(root / name / "peers", options, *pair, "--format", "onnx", *PEERS[name])
        if options.head:
            export(root / name / "eagle", options, "--drafter", str(options.head), *both)


def export(output: Path, options: argparse.Namespace, *arguments: str) -> None:
    """Make one export, unless its drafter is there."""
    if (output / "drafter").exists():
        return
    calibration = options.calibration
    counted = ["--calibration", calibration]
    if not calibration.endswith(".safetensors"):
        counted += ["--calibration-source", "text"]
    common = ["--max-length", str(CONTEXT), "--output", str(output), *counted]
    run([str(Path(sys.executable).with_name("vocabtrim-export")), *arguments, *common])


def run(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SystemExit(f"{command[0]} ended with {status}")


if __name__ == "__main__":
    main()
