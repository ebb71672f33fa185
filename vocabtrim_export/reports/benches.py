"""The output of `vocabtrim bench --json`, read and compared with the bundles of a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.bundle.manifest import Manifest, Role
from engines.bundle.typed_json import decode, read
from engines.errors import VocabtrimError

TARGET_ONLY = "target_only"


@dataclass(frozen=True, slots=True)
class Figures:
    """The fields of a `ModeReport` that a report shows."""

    tokens_per_second: float
    decode_speedup: float
    latency_speedup: float | None
    mbsu: float
    block_efficiency: float
    acceptance: tuple[float, ...]
    draft_step_ms: float | None
    verify_ms: float | None
    bytes_per_step: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One way of decoding.

    Attributes:
        mode: The name of the mode, or of a sweep's drafter.
        draft_length: γ, or the longest draft; 0 for the target alone.
        adapts: The lengths of drafts adapt to what they gain.
        context: Tokens of each prompt in a sweep of contexts; None where the prompts were left as they are.
        figures: The measured figures.
        head_rows: Rows of the drafter's LM head; of the target's for the target alone.
        is_exported: The drafter is the one that the report is about.
        limit_ms: The time of a step if memory alone limited it: its bytes over the measured bandwidth.
    """

    mode: str
    draft_length: int
    adapts: bool
    context: int | None
    figures: Figures
    head_rows: int
    is_exported: bool
    limit_ms: float

    @property
    def way(self) -> str:
        """The mode and its draft length in words."""
        name = self.mode.replace("_", " ")
        length = f"up to {self.draft_length}" if self.adapts else f"γ = {self.draft_length}"
        context = "" if self.context is None else f", {self.context} tokens of context"
        return name + (f", {length}" if self.draft_length else "") + context


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of `vocabtrim bench`.

    Attributes:
        name: Its name in the report.
        prompts: The number of prompts.
        max_new_tokens: Tokens generated for each prompt, at most.
        repeats: The number of times that each was decoded.
        force_accepted: Whether acceptance was forced, so that only latency was measured.
        lossless: Every output was the target's own, but for near-ties; None where acceptance was forced.
        bandwidth: Bytes/s that the target's memory delivers.
        cpu: The processor.
        cores: Its usable cores.
        rows: The ways of decoding.
    """

    name: str
    prompts: int
    max_new_tokens: int
    repeats: int
    force_accepted: bool
    lossless: bool | None
    bandwidth: float
    cpu: str
    cores: int
    rows: tuple[Measured, ...]


def named_path(argument: str) -> tuple[str, Path]:
    """Returns the name and the path of "name=path"; of a path alone, its file's name without the ending."""
    name, separator, path = argument.partition("=")
    return (Path(argument).stem, Path(argument)) if not separator or Path(argument).exists() else (name, Path(path))


def read_bench(argument: str, bundles: Mapping[Role, Manifest]) -> Bench:
    """Read one file that `vocabtrim bench --json` wrote.

    Args:
        argument: The file, or "name=file".
        bundles: The bundles that it must have measured.

    Raises:
        VocabtrimError: The file is of another kind, or measured other bundles.
    """
    name, path = named_path(argument)
    data = read(path)
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "plan":
        raise VocabtrimError(f"--bench {path} is a plan, which measures single steps: give `vocabtrim bench --json`")
    if kind not in ("bench", "sweep"):
        raise VocabtrimError(f"--bench {path} is not the JSON of `vocabtrim bench --json`")
    modes = _modes_of_bench(data, path) if kind == "bench" else _modes_of_sweep(data, path)
    settings = data if kind == "bench" else data.get("settings")
    machine = _pick(_Machine, data.get("environment"), f"{path}: environment")
    _check_bundles(machine.bundles, bundles, path)
    run = _pick(_Run, settings, str(path))
    whole = _pick(_Whole, data, str(path))
    own = bundles["drafter"].digest if "drafter" in bundles else ""
    rows = tuple(_measured(mode, machine.bundles, own, whole.bandwidth, path) for mode in modes)
    return Bench(
        name,
        whole.prompts,
        run.max_new_tokens,
        run.repeats,
        isinstance(settings, dict) and settings.get("force_accepted") is not None,
        whole.lossless,
        whole.bandwidth,
        machine.cpu,
        machine.cores,
        rows,
    )


@dataclass(frozen=True, slots=True)
class _Identity:
    digest: str
    head_rows: int


@dataclass(frozen=True, slots=True)
class _Machine:
    cpu: str
    cores: int
    bundles: Mapping[str, _Identity]


@dataclass(frozen=True, slots=True)
class _Run:
    max_new_tokens: int
    repeats: int


@dataclass(frozen=True, slots=True)
class _Whole:
    prompts: int
    bandwidth: float
    lossless: bool | None


@dataclass(frozen=True, slots=True)
class _Mode:
    name: str
    draft_length: int
    adapts: bool
    context: int | None
    figures: Figures


@dataclass(frozen=True, slots=True)
class _Row:
    drafter: str
    draft_length: int
    context: int | None


@dataclass(frozen=True, slots=True)
class _Lengths:
    draft_length: int
    adapts: bool


def _modes_of_bench(data: dict[str, Any], path: Path) -> list[_Mode]:
    lengths = _pick(_Lengths, data, str(path))
    modes: Mapping[str, Any] = decode(Mapping[str, Any], data.get("modes"), f"{path}: modes")
    return [
        _Mode(
            name,
            lengths.draft_length if name != TARGET_ONLY else 0,
            lengths.adapts and name != TARGET_ONLY,
            None,
            _pick(Figures, mode, f"{path}: {name}"),
        )
        for name, mode in modes.items()
    ]


def _modes_of_sweep(data: dict[str, Any], path: Path) -> list[_Mode]:
    rows = []
    for index, each in enumerate(decode(tuple[Any, ...], data.get("rows"), f"{path}: rows")):
        where = f"{path}: rows[{index}]"
        row = _pick(_Row, each, where)
        rows.append(_Mode(row.drafter, row.draft_length, False, row.context, _pick(Figures, each.get("report"), where)))
    return rows


def _pick(kind: Any, data: object, where: str) -> Any:
    """Decode the fields of a dataclass from an object that may have others."""
    if not isinstance(data, dict):
        raise VocabtrimError(f"{where} is not an object: measure again with `vocabtrim bench --json`")
    missing = [name for name in kind.__slots__ if name not in data]
    if missing:
        raise VocabtrimError(f"{where} lacks {', '.join(missing)}: measure again with `vocabtrim bench --json`")
    return decode(kind, {name: data[name] for name in kind.__slots__}, where)


def _check_bundles(measured: Mapping[str, _Identity], bundles: Mapping[Role, Manifest], path: Path) -> None:
    target = measured.get(TARGET_ONLY)
    drafters = {each.digest for name, each in measured.items() if name != TARGET_ONLY}
    for role, manifest in bundles.items():
        digests = {target.digest if target else ""} if role == "target" else drafters
        if manifest.digest not in digests:
            raise VocabtrimError(
                f"--bench {path} measured another {role} than this one: run `vocabtrim bench` on these bundles"
            )


def _measured(mode: _Mode, identities: Mapping[str, _Identity], own: str, bandwidth: float, path: Path) -> Measured:
    identity = identities.get(mode.name)
    if identity is None:
        raise VocabtrimError(f"{path}: environment names no bundle {mode.name}: measure again")
    limit = 1e3 * mode.figures.bytes_per_step / bandwidth if bandwidth else 0.0
    shape = mode.name, mode.draft_length, mode.adapts, mode.context
    return Measured(*shape, mode.figures, identity.head_rows, identity.digest == own, limit)
