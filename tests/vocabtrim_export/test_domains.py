"""Domains of calibration data: counted apart, mixed by weight, kept in one file."""

from dataclasses import replace

import numpy as np
import pytest

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import Corpus, TokenCounts
from vocabtrim_export.calibration.counting import CalibrationSettings, calibrate_models, read_calibration
from vocabtrim_export.calibration.domains import Domain, coverage_by_domain, divided_tokens, domains_note

EMPTY = Corpus((), "", "", ())


@pytest.fixture
def place(tmp_path, tokenizer, model):
    """A directory with a model and two domains of text, of which the second has fewer tokens."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "code.txt").write_text("def fox(x): return x + 1\n\n" * 400)
    (tmp_path / "chat.txt").write_text("the lazy dog sleeps\n\n" * 120)
    return tmp_path


def count(place, *domains, tokens):
    settings = CalibrationSettings(domains, "text", tokens)
    return calibrate_models(None, str(place / "model"), place / "out" / "counts.safetensors", settings)


def plain(place, name, tokens, tokenizer):
    """The first tokens of the domain in the order of its calibration."""
    settings = CalibrationSettings((place / name,), "text", tokens)
    return calibrate_models(None, str(place / "model"), place / f"{name}.safetensors", settings)


def test_domains_are_counted_apart_and_mixed_by_weight(place, tokenizer):
    domains = f"code={place}/code.txt:3", f"chat={place}/chat.txt"
    found = count(place, *domains, tokens=1000)
    apart = [plain(place, name, tokens, tokenizer) for name, tokens in (("code.txt", 750), ("chat.txt", 250))]
    assert [each.runs[0].domain for each in found.domains] == ["code", "chat"]
    for mine, alone in zip(found.domains, apart, strict=True):
        assert mine.digest == alone.digest
    assert found.counts.tolist() == (apart[0].counts + apart[1].counts).tolist()
    assert found.describe()["tokens"] == 1000
    loaded = TokenCounts.load(place / "out" / "counts.safetensors")
    assert (loaded.digest, loaded.runs) == (found.digest, found.runs)
    assert [path.name for path in (place / "out").glob("*.safetensors*")] == ["counts.safetensors"]
    kept = np.flatnonzero(loaded.domains[0].counts)
    assert coverage_by_domain(loaded, kept)["code"] == 1.0
    assert domains_note(loaded, kept)[0].startswith("coverage by domain: code 100.00%, chat ")
    more = count(place, *domains, tokens=1200)  # goes on from the domains in the file
    assert [each.total for each in more.domains] == [900, 300]


@pytest.mark.parametrize(
    ("weights", "tokens", "shares"),
    [
        ((1, 1), 2, [1, 1]),
        ((1, 1), 3, [2, 1]),
        ((3, 1), 1000, [750, 250]),
        ((1, 1, 1), 100, [33, 34, 33]),
        ((0.1, 0.2), 7, [2, 5]),
        ((1, 1), "auto", ["auto", "auto"]),
    ],
)
def test_tokens_are_shared_out_by_weight_and_none_is_added(weights, tokens, shares):
    domains = [Domain(str(index), weight, EMPTY) for index, weight in enumerate(weights)]
    assert divided_tokens(domains, tokens) == shares


@pytest.mark.parametrize(("weights", "tokens", "needed"), [((1, 1), 1, 2), ((1, 9, 990), 500, 1000)])
def test_too_few_tokens_for_all_domains_are_refused(weights, tokens, needed):
    domains = [Domain(str(index), weight, EMPTY) for index, weight in enumerate(weights)]
    with pytest.raises(VocabtrimError, match=f"leaves none to some domain: count at least {needed}$"):
        divided_tokens(domains, tokens)
    assert sum(divided_tokens(domains, needed)) == needed


def test_a_domain_with_too_little_text_still_has_its_weight(place):
    found = count(place, f"code={place}/code.txt", f"chat={place}/chat.txt:2", tokens=9000)
    code, chat = found.domains
    assert chat.total < 2 * code.total
    shares = [np.rint(each.counts * factor).sum() for each, factor in ((code, 1), (chat, 2 * code.total / chat.total))]
    assert shares[1] / shares[0] == pytest.approx(2, rel=0.15)  # up to the held-out parts, which differ a little
    assert found.counts.sum() == sum(shares)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["code={0}/code.txt:much"], "the weight 'much' is not a positive number"),
        (["code={0}/code.txt:0"], "the weight '0' is not a positive number"),
        (["code={0}/code.txt:nan"], "the weight 'nan' is not a positive number"),
        (["code={0}/code.txt:-1"], "the weight '-1' is not a positive number"),
        (["code={0}/code.txt:1e400"], "the weight '1e400' is not a positive number from 0.001 to 1000"),
        (["code={0}/code.txt:1e-9"], "the weight '1e-9' is not a positive number from 0.001 to 1000"),
        (["code={0}/code.txt", "code={0}/chat.txt"], "names the domain code twice"),
        (["code={0}/code.txt", "{0}/chat.txt"], "chat.txt has no name"),
        (["my code={0}/code.txt"], "the name 'my code' is not of letters"),
        (["={0}/code.txt"], "the name '' is not of letters"),
        (["code=:2"], "code=:2: the path is missing, write code=PATH:2"),
        (["code={0}/some.safetensors"], "is a file of weights or token counts, which is not read"),
        (["code={0}/missing.txt:2"], "calibration data not found: .*missing.txt"),
    ],
)
def test_domains_that_cannot_be_meant_are_refused(place, given, message):
    (place / "some.safetensors").write_bytes(bytes(9))
    with pytest.raises(VocabtrimError, match=message):
        read_calibration([each.format(place) for each in given])


def test_a_path_may_hold_the_marks_of_a_domain(place):
    odd = place / "a=b:2"
    odd.write_text("the fox")
    assert read_calibration([odd]).domains == ()
    (domain,) = read_calibration([f"odd={odd}"]).domains
    assert (domain.name, domain.weight, len(domain.corpus.documents)) == ("odd", 1.0, 1)


def test_a_mixture_adds_up_with_other_counts(place, tmp_path):
    mixture = count(place, f"code={place}/code.txt", f"chat={place}/chat.txt", tokens=200)
    total = mixture + replace(mixture, runs=(replace(mixture.runs[0], seed=9),), domains=())
    total.save(tmp_path / "sum.safetensors")
    assert TokenCounts.load(tmp_path / "sum.safetensors").counts.tolist() == (2 * mixture.counts).tolist()


def test_a_file_whose_domains_were_changed_is_refused(place):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    count(place, f"code={place}/code.txt", f"chat={place}/chat.txt", tokens=200)
    path = place / "out" / "counts.safetensors"
    with safe_open(path, "numpy") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    arrays["counts.chat"] = arrays["counts.chat"] + 1
    save_file(arrays, path, metadata)
    with pytest.raises(VocabtrimError, match="domains that do not add up"):
        TokenCounts.load(path)
    del arrays["counts.chat"]
    save_file(arrays, path, metadata)
    with pytest.raises(VocabtrimError, match=r"lacks the counts of a domain"):
        TokenCounts.load(path)
