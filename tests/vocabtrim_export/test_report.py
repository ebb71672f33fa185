"""`vocabtrim report`: its figures against plain counts, hostile text, a browser's view, and a user's mistakes."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.bundle.read import read_bundle
from engines.bundle.tokenizer import Tokenizer
from vocabtrim_export.calibration import TokenCounts
from vocabtrim_export.calibration.counting import CalibrationSettings, calibrate_models
from vocabtrim_export.cli.main import main
from vocabtrim_export.reports.coverage import places, wilson

HOSTILE = "<script>document.title.hacked()</script><img onerror>"
LINES = f'{HOSTILE} & the "quick" fox\nthe quick brown fox\nzebra | `quartz` *jazz* [vex](javascript:hacked)\n'


@pytest.fixture(scope="module")
def place(random_model, export_pair, tmp_path_factory):
    """An export of a model with a hostile name, with the counts of two domains; its benches and a text."""
    root = tmp_path_factory.mktemp("report")
    model = root / "<b onclick=hacked>" / 'model & "more"'
    shutil.copytree(random_model("llama"), model)
    letters = "".join(map(chr, range(33, 0x2400, 7)))
    (root / "code.txt").write_text("def fox(x): return x + 1\n\n" * 300 + letters)
    (root / "<i>.txt").write_text("the lazy dog sleeps & jumps <over>\n\n" * 300 + letters * 2)
    domains = f"code={root}/code.txt:2", f"chat={root}/<i>.txt"
    settings = CalibrationSettings(domains, "text", 3000)
    calibrate_models(None, str(model), root / "counts.safetensors", settings)
    pair = export_pair(model, calibration=CalibrationSettings((root / "counts.safetensors",)), k=64)
    full = export_pair(model, k=100000)
    output = pair.drafter.parent
    shutil.copy(root / "counts.safetensors", output / "token_counts.safetensors")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES.splitlines()))
    (root / "prompts.jsonl").write_text('{"prompt": "the quick brown fox"}\n{"prompt": "the lazy dog"}\n')
    return SimpleNamespace(root=root, output=output, full=full.drafter)


@pytest.fixture(scope="module")
def benches(place):
    """Returns what `bench --json` printed, for one length with the full drafter, and for a sweep."""
    import contextlib
    import io

    def run(name, *options):
        printed = io.StringIO()
        drafters = ["--drafter", str(place.output / "drafter"), "--baseline-drafter", str(place.full)]
        given = ["bench", "--target", str(place.output / "target"), *drafters, "--json", "--max-new-tokens", "16"]
        with contextlib.redirect_stdout(printed):
            assert main([*given, "--prompts", str(place.root / "prompts.jsonl"), "--repeats", "1", *options]) == 0
        path = place.root / f"{name}.json"
        path.write_text(printed.getvalue())
        return path

    return run("single", "--draft-length", "3"), run("sweep", "--draft-length", "1,2")


@pytest.fixture
def report(place, benches, capsys, tmp_path):
    """report(*options) → what the command printed; the page is in tmp_path / "page.html"."""

    def run(*options):
        texts = ["--text", f"{HOSTILE}={place.root / 'text.jsonl'}"]
        benched = ["--bench", f"{HOSTILE}={benches[0]}", str(benches[1])]
        page = [] if options else ["--output", str(tmp_path / "page.html")]
        assert main(["report", str(place.output), *texts, *benched, *page, *options]) == 0
        return capsys.readouterr().out

    return run


def test_figures_are_plain_counts(report, place):
    data = json.loads(report("--json"))
    counts = TokenCounts.load(place.root / "counts.safetensors").resized(448)
    bundle = read_bundle(place.output / "drafter")
    kept = set(bundle.vocab_map.kept_token_ids.tolist())
    curves = {(each["origin"], each["domain"]): each for each in data["coverage"]}
    assert list(curves) == [("calibration", name) for name in ("code", "chat", "all")] + [("text", HOSTILE)]
    held_out = {each.runs[0].domain: each.held_out for each in counts.domains} | {"all": counts.held_out}
    for name, array in held_out.items():
        shares = {point["rows"]: point["share"] for point in curves["calibration", name]["points"]}
        assert shares[64] == pytest.approx(sum(int(array[token]) for token in kept) / array.sum())
        assert shares[448] == 1
    assert shares[64] == pytest.approx(bundle.manifest.coverage)
    tokenizer = Tokenizer.load(bundle.path)
    lines = tokenizer.backend.encode_batch(LINES.splitlines(), add_special_tokens=False)
    point = next(each for each in curves["text", HOSTILE]["points"] if each["rows"] == 64)
    shares = [np.mean([token in kept for token in line.ids]) for line in lines]
    assert min(shares) <= point["low"] < point["share"] < point["high"] <= max(shares)
    assert point["share"] == pytest.approx(np.average(shares, weights=[len(line.ids) for line in lines]))
    lost = [token not in kept for line in lines for token in line.ids]
    assert sum(each["lost"] for each in data["lines"]) == sum(lost)
    seen = counts.counts + counts.held_out
    lost = {token: int(seen[token]) for token in range(448) if token not in kept and seen[token]}
    assert data["kept"]["lost_counted"] == len(lost) > 40
    assert {each["token_id"]: each["seen"] for each in data["kept"]["most_lost"]} == dict(
        sorted(lost.items(), key=lambda each: -each[1])[:40]
    )
    rows = {(bench["name"], row["mode"]): row for bench in data["benches"] for row in bench["rows"]}
    assert rows[HOSTILE, "full_drafter"]["head_rows"] == 448
    assert [each["is_exported"] for each in rows.values()].count(True) == 2


def test_the_interval_of_counts_is_wilsons():
    """The values are those of R's prop.test(8, 10, correct=FALSE) and of the rule of three's neighbour."""
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10**6, 10**6)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_page_lies_beside_the_bundles_and_never_within_one(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place.output, tmp_path / "out")
    assert main(["report", "out"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    before = sorted(path.name for path in (tmp_path / "out" / "drafter").iterdir())
    assert main(["report", "out/drafter"]) == 0
    assert (tmp_path / "report.html").is_file()
    assert sorted(path.name for path in (tmp_path / "out" / "drafter").iterdir()) == before
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_curves_are_exact_at_the_exports_own_k():
    """The head's own tokens come first, also where the counts alone would have kept other tokens."""
    order = np.array([3, 0, 2, 1, 4, 5])  # by counts
    assert places(np.array([1, 3, 5]), order).tolist() == [3, 1, 4, 0, 5, 2]


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data):
        self.text += data


def test_hostile_text_stays_text(report, tmp_path):
    report()
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.elements.count("script") == page.elements.count("style") == 1
    assert not {"img", "b", "i"} & set(page.elements)
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "style")]
    assert page.text.count(HOSTILE) >= 4  # a text's and a bench's name, in tables and a legend
    assert "http://" not in re.sub(r'xmlns="[^"]*"', "", text)
    assert "https://" not in text
    markdown = report("--markdown")
    assert "<" not in re.sub(r"\\<", "", markdown)
    assert "](" not in re.sub(r"\\\]", "", markdown)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| Way")}
    assert widths == {8}


RUN = """
<script>{axe}</script>
<script>
const table = [...document.querySelectorAll("table")].find((each) => each.rows[0].cells[0].textContent === "Token");
const order = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.value));
const [, ids] = table.querySelectorAll("thead button");
ids.click();
const ascending = order();
ids.click();
const found = {{ascending, descending: order(), sort: ids.parentElement.getAttribute("aria-sort"),
  title: document.title, dark: matchMedia("(prefers-color-scheme: dark)").matches,
  width: document.documentElement.scrollWidth}};
axe.run().then((result) => {{
  found.passes = result.passes.length;
  found.violations = result.violations.map((each) => [each.id, each.nodes.map((node) => node.html).slice(0, 3)]);
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}});
</script>
"""


@pytest.fixture(scope="module")
def browse():
    """browse(path, *options) → the page's elements after its script ran, as headless Chromium has them."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell")

    def run(path, *options):
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
        done = subprocess.run([*command, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(("scheme", "size"), [("0", "390,2000"), ("1", "1280,2000")])
def test_a_browser_shows_it_accessibly(scheme, size, browse, report, tmp_path):
    report()
    page = tmp_path / "page.html"
    assert "</button></th>" in browse(page)  # the page's policy lets its own script run
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None:
        pytest.skip("no axe-core here: pip install --no-deps axe-playwright-python")
    axe = (Path(package.origin).parent / "axe.min.js").read_text("utf-8")
    text = re.sub("<meta http-equiv[^>]*>", "", page.read_text())
    page.write_text(text.replace("</body>", RUN.format(axe=axe) + "</body>"))
    shown = browse(page, f"--window-size={size}", f"--blink-settings=preferredColorScheme={scheme}")
    found = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', shown)[1]))
    assert found["violations"] == []
    assert found["passes"] > 20
    assert found["dark"] is (scheme == "0")
    assert found["width"] <= int(size.split(",")[0])
    assert found["ascending"] == sorted(found["ascending"]) == found["descending"][::-1]
    assert (found["sort"], found["title"]) == ("descending", "Export bundles")


@pytest.fixture
def mistake(place, tmp_path, capsys):
    """mistake(*arguments) → the one line on standard error; nothing was written."""

    def run(*arguments):
        page = tmp_path / "page.html"
        assert main(["report", *map(str, arguments), "--output", str(page)]) == 2
        assert not page.exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_a_mistake_is_one_line(mistake, place, benches, tmp_path):
    assert "holds no export: give the --output of vocabtrim-export" in mistake(tmp_path)
    assert "holds no export" in mistake(tmp_path / "nowhere")
    export = place.output
    other = tmp_path / "other"
    (other / "drafter").mkdir(parents=True)
    assert "is not a bundle" in mistake(other)
    counts = tmp_path / "counts.safetensors"
    TokenCounts(np.ones(448, np.int64), np.ones(448, np.int64), "other", ()).save(counts)
    assert "holds other counts than those that chose this" in mistake(export, "--counts", counts)
    counts.write_bytes(counts.read_bytes()[:-9])
    assert "is not a file of token counts" in mistake(export, "--counts", counts)
    assert "does not exist: give a file of token counts" in mistake(export, "--counts", tmp_path / "none.safetensors")
    damaged, digest = tmp_path / "damaged.json", read_bundle(export / "drafter").manifest.digest
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "is not the JSON of `vocabtrim bench --json`"),
        ('{"kind": "plan"}', "is a plan"),
        ('{"kind": "bench", "modes": {}}', "lacks draft_length, adapts"),
        (benches[0].read_text().replace('"cores": ', '"cores": "x", "c": '), "cores is "),
        (benches[0].read_text().replace('"bundles"', '"b"'), "environment lacks bundles: measure again"),
        (benches[0].read_text().replace(digest, "0" * 64), "measured another drafter than this one"),
    ):
        damaged.write_text(content)
        assert message in mistake(export, "--bench", damaged)
    assert "calibration data not found" in mistake(export, "--text", tmp_path / "none.txt")
    shutil.copytree(export, other, dirs_exist_ok=True)
    with (other / "target" / "model.onnx.data").open("r+b") as file:
        file.write(b"damaged")
    assert "model.onnx.data" in mistake(other)


def test_only_an_earlier_page_is_replaced(place, tmp_path, capsys):
    """Swapped options would lose a measurement or break a bundle."""
    bench, page = tmp_path / "bench.json", tmp_path / "page.html"
    bench.write_text("{}")
    assert main(["report", str(place.output), "--output", str(bench)]) == 2
    assert f"{bench} exists and is no web page" in capsys.readouterr().err
    assert bench.read_text() == "{}"
    page.touch()
    for _ in range(2):
        assert main(["report", str(place.output), "--output", str(page)]) == 0
        assert page.read_text().startswith("<!doctype html>")
