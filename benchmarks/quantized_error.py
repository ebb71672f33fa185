"""Measure the error of quantised engines against the weights they store, for dense models and mixtures of experts.

    python benchmarks/quantized_error.py [--only NAME…]

Each tiny random model is written in int8 and int4 and run on ONNX Runtime's CPU provider, which rounds the inputs of
its products to 8 bits. Its logits are compared with PyTorch's on the dequantised weights: the root mean square error of
each token, over the logits' spread. The tokens are fed at once, and in calls of 1, 5 and 34.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import save_model

if TYPE_CHECKING:
    from vocabtrim_export.lowering.quantize import Quantization

NAMES = ["qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss", "dots1"]
QUANTIZATIONS: "tuple[Quantization, ...]" = ("int8", "int4")
CALLS = ((0, 1), (1, 6), (6, 40))


def measure(name: str, quantization: "Quantization", work: Path) -> str:
    import torch

    from engines import load_engine
    from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
    from vocabtrim_export.proof.dequantized import dequantized
    from vocabtrim_export.proof.proven import trace_source
    from vocabtrim_export.sources.source import DTYPES, load_source

    save_model(name, work / "model")
    source = load_source(str(work / "model"), DTYPES["fp32"])
    plan = BundlePlan("target", source, "fp32", quantization, context_length=128)
    (bundle := work / "bundle").mkdir()
    write_bundle(bundle, trace_source(plan), plan, lambda *_: None)
    ids = np.random.default_rng(3).integers(3, 250, 40)
    head = {source.model.get_output_embeddings(): None}
    with dequantized(source.model, bundle / "model.onnx", quantization, head), torch.inference_mode():
        wanted = source.model(torch.from_numpy(ids)[None]).logits[0].numpy()
    with load_engine(bundle) as engine:
        whole = engine.feed(ids, keep=len(ids)).logits.copy()
        engine.rewind(0)
        parts = [engine.feed(ids[begin:end], keep=end - begin).logits.copy() for begin, end in CALLS]
    off = np.sqrt(np.square(whole - wanted).mean(-1)) / wanted.std()
    equal = np.array_equal(np.concatenate(parts), whole)
    return f"{name} {quantization}: median {np.median(off):.3f}, worst {off.max():.3f}, by calls bit for bit: {equal}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="*", metavar="NAME", default=NAMES, help="architectures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    for name in options.only:
        for quantization in QUANTIZATIONS:
            with tempfile.TemporaryDirectory() as work:
                print(measure(name, quantization, Path(work)), flush=True)


if __name__ == "__main__":
    main()
