"""`vocabtrim bench` on tiny real bundles: what it prints, its JSON against the schema, and a user's mistakes."""

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jsonschema
import pytest

import runtime.rules
from engines.bundle.experts import Experts
from runtime.accept import Accepted, accept_greedy
from runtime.measure.bench import bench as run_bench
from tests.runtime.conftest import make_drafter, make_target
from vocabtrim_export.cli.bench_tables import show
from vocabtrim_export.cli.main import main

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "bench.schema.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def pair(random_model, export_pair):
    """The target's bundle, a trimmed drafter's, and its full one's."""
    model = random_model("llama")
    trimmed, full = export_pair(model), export_pair(model, k=100000)
    return trimmed.target, trimmed.drafter, full.drafter


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text('{"prompt": "the quick brown fox"}\n{"prompt": "the lazy dog"}\n')
    return path


@pytest.fixture
def bench(pair, prompts, capsys):
    """bench(*options, drafters=1) → what it printed."""

    def run(*options, drafters=1):
        target, *rest = map(str, pair)
        given = ["--target", target, "--drafter", *rest[:drafters], "--prompts", str(prompts)]
        assert main(["bench", *given, "--max-new-tokens", "16", "--repeats", "1", *options]) == 0
        return capsys.readouterr().out

    return run


def validated(text):
    data = json.loads(text)
    jsonschema.validate(data, SCHEMA, cls=jsonschema.Draft202012Validator)
    return data


@pytest.mark.parametrize("options", [["--draft-length", "4"], ["--draft-length", "1,3"]])
def test_an_output_that_is_not_the_targets_own_is_exit_code_1(options, pair, prompts, capsys, monkeypatch):
    def drafted_instead(draft, verified):
        right = accept_greedy(draft, verified)
        return Accepted(right.count, draft[right.count]) if right.count < len(draft) else right

    monkeypatch.setattr(runtime.rules, "accept_greedy", drafted_instead)
    given = ["bench", "--target", str(pair[0]), "--drafter", str(pair[1]), "--prompts", str(prompts)]
    given += ["--max-new-tokens", "16", "--repeats", "1", *options]
    assert main(given) == 1
    text = capsys.readouterr().out
    assert "different at token" in text
    assert text.splitlines()[-1] == "NOT LOSSLESS"
    assert main([*given, "--json"]) == 1
    data = validated(capsys.readouterr().out)
    assert data["lossless"] is False


def test_a_mixture_that_speculation_does_not_pay_for_is_named(capsys):
    """A fake's verification costs as much for each token as a step does."""
    target = make_target(experts=(Experts(8, 2, 2400, (2.0, 3.5, 5.0)),))
    show(run_bench(target, {"drafter": make_drafter()}, [[3, 4], [5]], max_new_tokens=24, draft_length=2))
    verdict, reads = capsys.readouterr().out.splitlines()[-2:]
    assert verdict.startswith("speculation does not pay here: at best 0.")
    assert reads.startswith("the target is a mixture of experts: 3 tokens read 5.0 experts of a layer where one ")


def test_a_single_configuration(bench, pair):
    data = validated(bench("--json", "--draft-length", "3", "--baseline-drafter", str(pair[2])))
    assert list(data["modes"]) == ["target_only", "full_drafter", "trimmed_drafter"]
    assert (data["kind"], data["draft_length"], data["lossless"]) == ("bench", 3, True)
    text = bench()
    assert "drafts of up to 16, greedy" in text
    assert "2/2" in text
    assert "of the measured bandwidth" in text


def test_a_profile_holds_rounds_and_the_operators_of_both_engines(bench, tmp_path):
    bench("--profile", str(tmp_path / "traces"), "--json")
    spans, products = read_profile(tmp_path / "traces")
    assert {"draft", "verify"} <= set(spans)
    assert set(products) == {"target.json", "drafter.json"}
    assert all(products.values())


def read_profile(directory):
    """The names of the rounds' spans, and how often each graph computed a product."""
    read = {path.name: json.loads(path.read_text()) for path in directory.iterdir()}
    spans = [event["name"] for event in read.pop("rounds.json")["traceEvents"]]
    return spans, {
        name: sum("MatMul" in event.get("args", {}).get("op_name", "") for event in events)
        for name, events in read.items()
    }


def test_forced_acceptance_says_so(bench):
    text = bench("--force-accepted", "2", "--draft-length", "3")
    assert "forced: 2 drafted tokens accepted a round" in text
    assert "2/2" not in text
    data = validated(bench("--force-accepted", "2", "--draft-length", "3", "--json"))
    assert (data["lossless"], data["modes"]["trimmed_drafter"]["equal_prompts"]) == (None, None)
    assert data["modes"]["trimmed_drafter"]["block_efficiency"] == 3


def test_a_sweep_its_json_and_its_plot(bench, tmp_path):
    plot = tmp_path / "sweep.svg"
    options = ["--draft-length", "2,1", "--context", "8,40", "--plot", str(plot)]
    data = validated(bench(*options, "--json", drafters=2))
    assert (data["kind"], data["lossless"], len(data["rows"])) == ("sweep", True, 2 * (1 + 2 * 2))
    assert {row["head_rows"] for row in data["rows"]} == {192, 448}
    svg = ElementTree.parse(plot).getroot()
    assert svg.tag.endswith("svg")
    lines = svg.findall(".//{*}polyline")
    assert len(lines) == 2 * 2  # a panel for each context, a line for each drafter
    assert "prefers-color-scheme:dark" in plot.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.svg"]
    text = bench(*options, drafters=2)
    assert "all outputs equal target only's" in text
    assert text.count("target only") == 3


def test_a_plan(bench):
    data = validated(bench("--plan", "--draft-length", "1,3", "--json", drafters=2))
    assert len(data["plan"]["candidates"]) == 4
    assert data["plan"]["trimming_pays"] in (True, False)
    text = bench("--plan")
    assert "speculation" in text
    assert "--draft-length" in text


def test_random_weights(capsys, tmp_path):
    options = ["--random-weights", "tiny", "--quantize-drafter", "int4", "--max-new-tokens", "24", "--repeats", "1"]
    options += ["--bundles", str(tmp_path), "--max-length", "64"]
    assert main(["bench", *options, "--k", "128,full", "--draft-length", "1,3", "--context", "32", "--json"]) == 0
    data = validated(capsys.readouterr().out)
    assert [(row["drafter"], row["head_rows"], row["report"]["block_efficiency"]) for row in data["rows"]] == [
        ("target_only", 512, 1),
        ("128 rows", 128, pytest.approx(23 / 12)),
        ("128 rows", 128, pytest.approx(23 / 6)),
        ("full", 512, pytest.approx(23 / 12)),
        ("full", 512, pytest.approx(23 / 6)),
    ]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len({path.parent for path in made}) == 3
    assert main(["bench", *options, "--k", "128", "--force-accepted", "0", "--json"]) == 0
    data = validated(capsys.readouterr().out)
    assert (data["kind"], data["force_accepted"]) == ("bench", 0)
    assert {path: path.stat().st_mtime_ns for path in made} == made  # used, not made again

    manifest = next(path for path in made if "target" in str(path) and path.name == "vocabtrim.json")
    manifest.write_text('{"format_version": 2}')  # as an earlier version left it
    assert main(["bench", *options, "--k", "128", "--force-accepted", "0", "--json"]) == 0
    again = {path for path in made if path.stat().st_mtime_ns != made[path]}
    assert again == {path for path in made if path.parent == manifest.parent}


def test_a_random_eagle_head_for_a_target_that_gives_what_it_reads(capsys, tmp_path):
    options = ["--random-weights", "tiny", "--random-drafter", "eagle3-tiny", "--dtype", "fp16"]
    options += ["--quantize-drafter", "int4", "--max-new-tokens", "24", "--repeats", "1", "--bundles", str(tmp_path)]
    options += ["--profile", str(tmp_path / "traces")]
    assert main(["bench", *options, "--k", "128,full", "--draft-length", "3", "--json"]) == 0
    rows = validated(capsys.readouterr().out)["rows"]
    assert [(row["drafter"], row["head_rows"], row["report"]["block_efficiency"]) for row in rows] == [
        ("target_only", 512, 1),
        ("128 rows", 128, pytest.approx(23 / 6)),
        ("full", 256, pytest.approx(23 / 6)),
    ]
    manifests = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/vocabtrim.json"))]
    assert [(each["kind"], each["feature_layers"], each["feature_size"]) for each in manifests] == [
        ("eagle3", [0, 1], 128),
        ("eagle3", [0, 1], 128),
        ("language-model", [0, 1], 128),
    ]
    spans, products = read_profile(tmp_path / "traces")
    assert set(products) == {"target.json", "drafter.json", "drafter_features.json"}
    assert products["drafter_features.json"] == spans.count("draft")  # features are read once a round
    assert all(products.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "120"], "a context of 120 tokens and 16 new ones do not fit in the 128 that the bundles hold"),
        (["--force-accepted", "5"], "--force-accepted is 5 and a round drafts 4 tokens"),
        (["--draft-length", "1,4", "--force-accepted", "2"], "--force-accepted is 2 and a round drafts 1 tokens"),
        (["--force-accepted", "x"], "argument --force-accepted: 'x': give a number from 0 up, or all"),
        (["--draft-length", "1,x"], "argument --draft-length: '1,x': give numbers from 1 up, separated by commas"),
        (["--context", "0"], "argument --context: '0': give numbers from 1 up"),
        (["--k", "128"], "--k is for --random-weights"),
        (["--quantize-drafter", "int4"], "--quantize-drafter is for --random-weights"),
        (["--num-prompts", "0"], "--num-prompts is 0: give 1 or more"),
        (["--plan", "--force-accepted", "1"], "--plan takes one --context at most"),
        (["--random-weights", "tiny"], "--random-weights makes its own bundles"),
        (["--profile", "/nowhere/traces"], "--profile /nowhere/traces: there is no directory /nowhere"),
        (["--profile", __file__], "that is a file, give a directory"),
        (["--profile", "traces", "--drafter-device", "cuda"], "--profile is for the CPU"),
        (["--plot", "/nowhere/a.svg"], "--plot /nowhere/a.svg: there is no directory /nowhere"),
    ],
)
def test_a_mistake_is_one_line(pair, prompts, capsys, options, message):
    given = ["bench", "--target", str(pair[0]), "--drafter", str(pair[1]), "--prompts", str(prompts)]
    assert code([*given, "--max-new-tokens", "16", *options]) == 2
    check_error(capsys, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--target is missing: give the bundles and prompts, or --random-weights NAME"),
        (["--random-weights", "tiny", "--k", "1024"], "--k 1024 is more than the 512 rows that tiny has"),
        (["--random-weights", "tiny", "--random-drafter", "llama-3.2-1b"], "llama-3.2-1b cannot draft for tiny"),
        (["--random-weights", "llama-3.2-1b", "--random-drafter", "eagle3-tiny"], "eagle3-tiny is a head for tiny"),
        (
            ["--random-weights", "tiny", "--random-drafter", "eagle3-tiny", "--k", "257"],
            "--k 257 is more than the 256 rows that eagle3-tiny has",
        ),
        (["--random-weights", "tiny", "--dtype", "bf16"], "ONNX Runtime has no bf16 on the CPU"),
        (["--random-weights", "tiny", "--device", "cuda"], "give --dtype fp16 or bf16"),
        (["--random-weights", "tiny", "--k", "few"], "argument --k: 'few': give numbers of rows or full"),
        (["--random-weights", "tiny", "--plan"], "random weights have no acceptance to plan with"),
        (["--random-weights", "tiny", "--max-length", "9999"], "--max-length 9999 is not in the 2 to 1024 tokens"),
        (["--random-weights", "huge"], "argument --random-weights: invalid choice"),
    ],
)
def test_a_mistake_with_random_weights_is_one_line(capsys, options, message):
    assert code(["bench", *options]) == 2
    check_error(capsys, message)


def test_without_cuda_no_random_weights_are_written_for_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    bench = ["bench", "--random-weights", "tiny", "--dtype", "fp16", "--bundles", str(tmp_path / "made")]
    assert code([*bench, "--device", "cuda"]) == 2
    check_error(capsys, "CUDA")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("what", ["memory", "disk space"])
def test_random_weights_that_do_not_fit_are_refused(capsys, monkeypatch, tmp_path, what):
    from vocabtrim_export.random_weights import bundles as random_weights

    room = {"memory": 1 << 50, "disk space": 1 << 50} | {what: 1 << 30}
    monkeypatch.setattr(random_weights, "available_memory", lambda: room["memory"])
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=room["disk space"]))
    assert code(["bench", "--random-weights", "llama-3.1-8b", "--bundles", str(tmp_path)]) == 2
    check_error(capsys, f"llama-3.1-8b needs 64.2 GB of {what} for 2 bundles and there are 1.1: use --dtype fp16")
    assert not list(tmp_path.iterdir())


def code(arguments):
    try:
        return main(arguments)
    except SystemExit as exit:
        return exit.code


def check_error(capsys, *messages):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for message in messages:
        assert message in lines[0]
    assert "Traceback" not in error
