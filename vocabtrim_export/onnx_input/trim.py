"""Trims the LM head of a drafter that is an ONNX model."""

import json
import shutil
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import GenerationConfig, PreTrainedTokenizerFast

from engines.bundle.graph_file import GraphFile
from engines.bundle.read import MODEL_NAME, VOCAB_MAP_NAME
from engines.bundle.tokenizer import TEMPLATES_NAME, tokenizer_digest
from engines.bundle.vocab_map import VocabMap
from engines.bundle.vocabulary import Vocabulary
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.output import COUNTS_NAME, check_output, placing, reserved
from vocabtrim_export.calibration import CalibrationSource, TokenCounts, skipped_note
from vocabtrim_export.calibration.counter import CountJob, Listener
from vocabtrim_export.calibration.counting import (
    CalibrationInput,
    CalibrationSettings,
    count_elsewhere,
    read_calibration,
)
from vocabtrim_export.lowering.graph_files import save_graph
from vocabtrim_export.onnx_input.cut import cut_head
from vocabtrim_export.onnx_input.head import find_head
from vocabtrim_export.onnx_input.prove import prove_cut
from vocabtrim_export.progress import Progress
from vocabtrim_export.selection import (
    Coverage,
    Selection,
    check_k,
    rows_to_choose,
    select_vocab,
    structural_token_ids,
)
from vocabtrim_export.sources.checkpoint import read_checkpoint_tokenizer
from vocabtrim_export.sources.paths import local_path

_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("config.json", "generation_config.json"),
)


@dataclass(frozen=True, slots=True)
class OnnxTrim:
    """The result of a trim.

    Attributes:
        drafter: The directory.
        product: The operator that was cut.
        head_bytes: The bytes of its constants, before and after.
        selection: The tokens that were kept.
        notes: Notes for the user.
    """

    drafter: Path
    product: str
    head_bytes: tuple[int, int]
    selection: Selection
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OnnxSource:
    """A directory with a decoder in ONNX and its tokenizer."""

    graph: Path
    tokenizer: PreTrainedTokenizerFast
    generation_config: GenerationConfig


def holds_onnx(spec: str) -> bool:
    """Returns whether MODEL is a local directory with an ONNX model and no weights to trim instead."""
    path = local_path(spec)
    return path.is_dir() and any(path.glob("*.onnx")) and not any(path.glob("*.safetensors"))


def trim_onnx(
    drafter: str,
    output: Path,
    k: int | Coverage,
    calibration: CalibrationSettings,
    force: bool = False,
    progress: Progress = lambda _task, _done, _total: None,
) -> OnnxTrim:
    """Cut the head of the ONNX model in `drafter` and write it, with its VocabMap, to `output/drafter`.

    Its inputs and outputs stay as they are, except that logits have K columns, and the output token_ids: int64[batch,
    sequence] is added, the most likely tokens as ids of the full vocabulary. The tokens come from counts, or text is
    counted: no model generates.

    Args:
        drafter: The directory of the ONNX model.
        output: The output directory.
        k: Rows of the head, or the share of held-out tokens to cover.
        calibration: The text that is counted to choose the tokens.
        force: Replace an earlier export in `output`.
        progress: Called with (task, done, total).

    Raises:
        VocabtrimError: The settings, the model or the calibration data are not valid.
    """
    check_output(output, ["drafter"], force)
    check_k(k)
    data = read_calibration(calibration.calibration)
    source = _open(local_path(drafter))
    model = ir.load(source.graph)
    head = find_head(model)
    _check_vocabulary(source, head.vocab, drafter)
    with reserved(output):
        counts = _count(source, data, calibration, k, output / COUNTS_NAME, progress)
        always = structural_token_ids(source.tokenizer, source.generation_config)
        selection = select_vocab(counts, k, always_keep=always, full_vocab=head.vocab)
        before = _bytes(head.product)
        cut_head(model, head, selection.vocab_map)
        after = _bytes(head.product)
        RemoveUnusedNodesPass()(model)
        notes = _write(output / "drafter", model, source, selection.vocab_map, progress)
    skipped = [each for corpus in data.corpora for each in corpus.skipped]
    notes = (*skipped_note(skipped), *notes)
    return OnnxTrim(output / "drafter", head.product.op_type, (before, after), selection, notes)


def _write(
    directory: Path, model: ir.Model, source: OnnxSource, vocab_map: VocabMap, progress: Progress
) -> tuple[str, ...]:
    """Write the trimmed `model` and the files next to its source, and prove it against the whole one.

    Returns:
        A note for the user where that cannot be proved.
    """
    with placing([directory]) as (fresh,):
        save_graph(model, fresh, "write drafter", progress)
        unproven = prove_cut(source.graph, fresh / MODEL_NAME, vocab_map)
        (fresh / VOCAB_MAP_NAME).write_bytes(vocab_map.to_bytes())
        _copy_beside(source.graph.parent, fresh)
    if not unproven:
        return ()
    return (f"the trimmed model was not run against the whole one, which this CPU cannot run: {unproven}",)


def _open(directory: Path) -> OnnxSource:
    graphs = sorted(directory.glob("*.onnx"))
    graph = directory / MODEL_NAME if directory / MODEL_NAME in graphs else graphs[0]
    if len(graphs) > 1 and graph.name != MODEL_NAME:
        names = ", ".join(path.name for path in graphs)
        raise VocabtrimError(
            f"{directory} holds several ONNX models ({names}): move the decoder into a directory of its own"
        )
    GraphFile.read(graph)  # refuses what points outside the directory, before anything of it is opened
    tokenizer = read_checkpoint_tokenizer(str(directory), str(directory))
    if not getattr(tokenizer, "is_fast", False):
        raise VocabtrimError(f"{directory} has no tokenizer.json: a fast tokenizer is needed")
    return OnnxSource(graph, tokenizer, _generation_config(directory))


def _check_vocabulary(source: OnnxSource, columns: int, drafter: str) -> None:
    beyond = Vocabulary.of(source.tokenizer.backend_tokenizer, columns).beyond
    if beyond is not None:
        raise VocabtrimError(
            f"the tokenizer of {drafter} has ids up to {beyond} and its head {columns} columns: give the tokenizer "
            "that belongs to it"
        )


def _generation_config(directory: Path) -> GenerationConfig:
    """Returns the configuration that names the tokens that end a text: transformers' file, or ONNX Runtime GenAI's."""
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    path = directory / "genai_config.json"
    ends = json.loads(path.read_text("utf-8")).get("model", {}).get("eos_token_id") if path.is_file() else None
    return GenerationConfig(eos_token_id=ends)


def _count(
    source: OnnxSource,
    data: CalibrationInput,
    settings: CalibrationSettings,
    k: int | Coverage,
    checkpoint: Path,
    progress: Progress,
) -> TokenCounts:
    if data.counts:
        counts = reduce(add, data.counts)
        if counts.tokenizer_digest != tokenizer_digest(source.tokenizer.backend_tokenizer):
            raise VocabtrimError("the token counts were made with another tokenizer than the model's: calibrate again")
        return counts
    if settings.calibration_source not in (None, "text") and not settings.calibration_endpoint:
        raise VocabtrimError(
            f"--calibration-source {settings.calibration_source}: an ONNX model is not run to calibrate; "
            "give the counts of vocabtrim calibrate, or count the text itself"
        )
    how: CalibrationSource = "target" if settings.calibration_endpoint else "text"
    listener = Listener(progress)  # the caller reports skipped records
    job = CountJob(how, settings, checkpoint, rows_to_choose(k) or 1, listener)
    return count_elsewhere(source.tokenizer, data, job, "")


def _copy_beside(source: Path, directory: Path) -> None:
    """Copy the tokenizer and the configs next to the graph."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if (source / TEMPLATES_NAME).is_dir():
        shutil.copytree(source / TEMPLATES_NAME, directory / TEMPLATES_NAME)


def _bytes(product: ir.Node) -> int:
    """Returns the bytes of the constants that a product reads, also through nodes that unpack them."""
    inputs = list(product.inputs[1:])
    if product.op_type == "MatMulInteger":
        del inputs[1]  # the activations' zero point, which the whole model stands behind
    values, total = [value for value in inputs if value is not None], 0
    while values:
        value = values.pop()
        producer = value.producer()
        if producer is not None:
            values += [each for each in producer.inputs if each is not None]
        elif value.const_value is not None:
            total += value.const_value.nbytes
    return total
