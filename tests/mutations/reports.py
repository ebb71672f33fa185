"""Promises of `vocabtrim report`."""

from tests.mutations.mutation import Mutation

REPORT = "tests/vocabtrim_export/test_report.py"

REPORTS = (
    Mutation(
        "A report's text is text",
        "templates do not escape",
        "vocabtrim_export/reports/page.py",
        "autoescape=True",
        "autoescape=False",
        f"{REPORT} -k hostile",
    ),
    Mutation(
        "A report's coverage is a plain count's",
        "kept tokens do not come first",
        "vocabtrim_export/reports/coverage.py",
        "np.concatenate([order[is_kept[order]], order[~is_kept[order]]])",
        "order",
        f"{REPORT} -k exact",
    ),
    Mutation(
        "A report's page never changes a bundle",
        "it is written into DIR whatever that is",
        "vocabtrim_export/cli/report_command.py",
        "if is_export else Path(PAGE_NAME)",
        "if export.is_dir() else Path(PAGE_NAME)",
        f"{REPORT} -k beside",
    ),
    Mutation(
        "A report shows benches of its own bundles",
        "any bench is taken",
        "vocabtrim_export/reports/benches.py",
        "if manifest.digest not in digests:",
        "if not digests:",
        f"{REPORT} -k mistake",
    ),
    Mutation(
        "A report's coverage is a plain count's",
        "an interval has no width",
        "vocabtrim_export/reports/coverage.py",
        "lows, highs = np.quantile(shares, _QUANTILES, axis=0)",
        "lows, highs = np.quantile(shares, (0.5, 0.5), axis=0)",
        f"{REPORT} -k plain",
    ),
)
