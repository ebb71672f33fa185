"""Explain an export on one page: what it keeps and loses, what was measured, and where it comes from."""

import argparse
import json
from pathlib import Path

from vocabtrim_export.cli.arguments import add_json_argument
from vocabtrim_export.cli.combinations import refuse_stated

PAGE_NAME = "report.html"

EXAMPLE = "out --bench bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("export", type=Path, metavar="DIR", help="the --output of vocabtrim-export, or one bundle")
    parser.add_argument(
        "--bench",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="the output of `vocabtrim bench --json` for these bundles, which adds speed, acceptance and latency; give "
        "a file for each domain to show them by domain",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help="text like your users', in the forms of --calibration: the report shows its coverage with a confidence "
        "interval, and sample lines in which the tokens that the head lacks are marked",
    )
    parser.add_argument(
        "--counts",
        type=Path,
        metavar="FILE",
        help="the token counts that chose the kept tokens (default: token_counts.safetensors in DIR, if it is there)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the page to write (default: {PAGE_NAME} in DIR, or in the current directory where DIR is one bundle)",
    )
    form = parser.add_mutually_exclusive_group()
    add_json_argument(form)
    form.add_argument("--markdown", action="store_true", help="print the report as Markdown on standard output")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from engines.errors import VocabtrimError
    from vocabtrim_export.bundles.output import write_whole
    from vocabtrim_export.reports.gather import ReportInputs, make_report

    if options.json or options.markdown:
        refuse_stated(options, {"output": None}, "is for the page, and --json and --markdown print: leave it out")
    page: Path = options.output or _default_page(options.export)
    if not page.absolute().parent.is_dir() or page.is_dir():
        raise VocabtrimError(f"--output {page}: name a file in a directory that exists")
    if not (options.json or options.markdown or _may_replace(page)):
        raise VocabtrimError(f"{page} exists and is no web page: --output names the page to write, name another file")
    report = make_report(ReportInputs(options.export, options.counts, tuple(options.bench), tuple(options.text)))
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif options.markdown:
        from vocabtrim_export.reports.markdown import to_markdown

        print(to_markdown(report), end="")
    else:
        from vocabtrim_export.reports.page import to_html

        write_whole(page, to_html(report).encode())
        print(f"{page}: open it in a browser")


def _default_page(export: Path) -> Path:
    """Returns the path of the page: next to the bundles that it describes, never within one."""
    from engines.bundle.read import MANIFEST_NAME

    is_export = export.is_dir() and not (export / MANIFEST_NAME).exists()
    return export / PAGE_NAME if is_export else Path(PAGE_NAME)


def _may_replace(page: Path) -> bool:
    """Returns whether nothing but an earlier page can be lost: not the bench's JSON, nor a part of a bundle."""
    if not page.is_file():
        return True
    with page.open("rb") as file:
        begin = file.read(64)
    return not begin or begin.lstrip()[:9].lower() == b"<!doctype"
