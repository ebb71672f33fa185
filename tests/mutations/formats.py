"""Promises about what `--format` writes for other programs."""

from tests.mutations.mutation import Mutation

FORMAT_TESTS = "tests/integration/test_formats.py"

FORMATS = (
    Mutation(
        "`--format`: a full row for GenAI holds no logit of a token that was cut",
        "zeros instead of minus infinity",
        "vocabtrim_export/formats/masked.py",
        "[-np.inf])",
        "[0.0])",
        f"{FORMAT_TESTS} -k full_row",
    ),
    Mutation(
        "`--format hf` puts each logit at its token",
        "rows in the wrong order",
        "vocabtrim_export/formats/hf.py",
        "index_copy_(-1, self.kept_token_ids, kept)",
        "index_copy_(-1, self.kept_token_ids.flip(0), kept)",
        f"{FORMAT_TESTS} -k hf_is",
    ),
    Mutation(
        "A format that cannot be written changes nothing",
        "bundles take their places before the formats are written",
        "vocabtrim_export/pipeline.py",
        "            write_formats(others, Exported(places, pair.manifests, models.sources, vocab_map), progress)\n",
        "        write_formats(others, Exported(places, pair.manifests, models.sources, vocab_map), progress)\n",
        f"{FORMAT_TESTS} -k fails_changes",
    ),
    Mutation(
        "Every graph opens in onnx, Polygraphy and ONNX Runtime",
        "the weights of another format are hard links",
        "vocabtrim_export/lowering/graph_files.py",
        "fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())",
        "place.unlink()\n            place.hardlink_to(source)",
        "tests/integration/test_opens.py -k formats",
    ),
    Mutation(
        "`d2t` of an EAGLE-3 checkpoint holds offsets",
        "absolute ids",
        "vocabtrim_export/formats/eagle3.py",
        " - torch.arange(len(kept))",
        "",
        "tests/vocabtrim_export/test_eagle3_format.py",
    ),
)
