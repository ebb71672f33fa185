"""Data sets of the Hugging Face hub, read as streams with its library `datasets` (the extra `data`)."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.records import FIELDS, MORE_FIELDS
from vocabtrim_export.calibration.text_files import Records, table_cells

ROWS = 20_000
_SECONDS = 5.0  # for the hub's first answer
_SHUFFLED = 1_000  # rows that are held to be shuffled, and whole files are shuffled too
_FORM = "hf://OWNER/NAME[,config=NAME][,split=NAME][,revision=NAME][,rows=N][,FIELD=COLUMN …]"
_NESTED = ("List", "LargeList", "Sequence", "Json")  # kinds of columns
_MESSAGE = 300  # characters of another library's error


@dataclass(frozen=True, slots=True)
class HubData:
    """A data set of the hub, from `hf://…`.

    Attributes:
        name: The argument as the user gave it.
        repository: The data set, "openai/gsm8k".
        columns: The columns that are read, by the field of a record that each stands for; empty: those whose names are
            fields.
        config: The configuration; None: the only one.
        split: The split; None: "train", or the only one.
        revision: A commit, branch or tag.
        rows: The number of rows to read at most.
    """

    name: str
    repository: str
    columns: Mapping[str, str]
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    rows: int = ROWS


def is_hub_data(name: str | Path) -> bool:
    """Returns whether the argument names a data set of the hub. A `Path` has lost the second slash of "hf://"."""
    return re.match("hf:/", str(name)) is not None


def parse_hub_data(name: str | Path) -> HubData:
    """Parse `hf://OWNER/NAME,…`.

    Raises:
        VocabtrimError: It has another form.
    """
    text = re.sub("^hf:/+", "hf://", str(name))
    repository, *options = text.removeprefix("hf://").split(",")
    settings: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not value or key in settings:
            raise VocabtrimError(f"{text}: {option!r} is not one of its options: write {_FORM}")
        settings[key] = value
    known = {key: settings.pop(key, None) for key in ("config", "split", "revision")}
    rows = settings.pop("rows", str(ROWS))
    if not repository or not rows.isdecimal() or int(rows) < 1:
        raise VocabtrimError(f"{text}: name a data set, and a positive number of rows: write {_FORM}")
    return HubData(text, repository, settings, **known, rows=int(rows))


def read_hub_data(name: str | Path) -> Records:
    """Yield the rows of a data set as records, in an order that is shuffled but always the same.

    The directory of a data set may stand for OWNER/NAME. Only the rows that are read are fetched.

    Args:
        name: hf://OWNER/NAME, with options.

    Raises:
        VocabtrimError: The data set cannot be read, or has no column that can be.
    """
    data = parse_hub_data(name)
    with _one_line(data):
        stream = _open(data)
        features, rows = stream.features, iter(stream)
        first = [] if features else list(islice(rows, 1))
        columns = list(features or (first[0] if first else ()))
        _check_columns(data, columns)
        if features:
            rows = iter(stream.select_columns([each for each in columns if _may_be_read(data, each, features)]))
        for number, row in enumerate(islice(chain(first, rows), data.rows), 1):
            chosen = {field: row[column] for field, column in data.columns.items()} if data.columns else row
            yield f"{data.name}, row {number}", table_cells(chosen)


def _open(data: HubData) -> Any:
    """Returns the stream of rows."""
    try:
        import datasets
    except ImportError as error:
        raise VocabtrimError(
            f"{data.name} is read with datasets: pip install 'vocabtrim-export[data]', or give a local file"
        ) from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    is_local = os.path.isdir(data.repository)
    is_cached = datasets.config.HF_HUB_OFFLINE and not is_local
    if not is_cached and not is_local:
        _check_hub(data)
    # What the cache holds was prepared whole, and is mapped into memory; everything else is streamed.
    splits = datasets.load_dataset(data.repository, data.config, revision=data.revision, streaming=not is_cached)
    split = data.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise VocabtrimError(f"{data.name} has no split {split}: choose from {', '.join(splits)}, as in ,split=NAME")
    rows = splits[split]
    stream = rows if isinstance(rows, datasets.IterableDataset) else rows.to_iterable_dataset()
    return stream.shuffle(seed=0, buffer_size=_SHUFFLED)


def _check_hub(data: HubData) -> None:
    """Ask the hub for the data set: the library itself would try for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(data.repository, revision=data.revision, timeout=_SECONDS)
    except GatedRepoError as error:
        raise VocabtrimError(f"{data.name} is gated: accept its terms on the hub and run `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise VocabtrimError(
            f"the hub has no data set {data.repository}, or it is private (`hf auth login`): write {_FORM}"
        ) from error
    except Exception as error:  # no network, a proxy's answer: each client has its own kinds
        raise VocabtrimError(
            f"{data.name}: the hub does not answer; give local files, or set HF_HUB_OFFLINE=1 for a data set in its "
            "cache"
        ) from error


def _check_columns(data: HubData, columns: list[str]) -> None:
    missing = [column for column in data.columns.values() if column not in columns]
    unknown = [field for field in data.columns if field not in (*FIELDS, *MORE_FIELDS)]
    if unknown:
        raise VocabtrimError(
            f"{data.name}: {unknown[0]} is no field of a record: {', '.join((*FIELDS, *MORE_FIELDS))}; write {_FORM}"
        )
    names = ", ".join(columns[:30]) or "none"
    if missing:
        raise VocabtrimError(f"{data.name} has no column {missing[0]}, its columns are {names}")
    if not data.columns and not {*FIELDS, "request", "body"}.intersection(columns):
        raise VocabtrimError(
            f"{data.name} has the columns {names}, and none that is a field of a record: name one, as in "
            f"{data.name},text={columns[0] if columns else 'COLUMN'}"
        )


def _may_be_read(data: HubData, column: str, features: Mapping[str, Any]) -> bool:
    """Returns whether a column is asked for, or can hold text: images and sounds are not fetched."""
    if data.columns:
        return column in data.columns.values()
    feature = features[column]
    is_text = getattr(feature, "dtype", None) in ("string", "large_string")
    return is_text or column in FIELDS or isinstance(feature, dict | list) or type(feature).__name__ in _NESTED


@contextmanager
def _one_line(data: HubData) -> Iterator[None]:
    """Turn the many kinds of errors of `datasets` and its file systems into one line."""
    try:
        yield
    except VocabtrimError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:_MESSAGE] or type(error).__name__
        raise VocabtrimError(f"cannot read {data.name}: {reason}") from error
