"""Bundles of random weights in the shape of a known model, to measure its latency without its weights."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.read import Role, read_bundle
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.output import replacing
from vocabtrim_export.bundles.size import bundle_bytes
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.lowering.quantize import Quantization
from vocabtrim_export.memory import available_memory
from vocabtrim_export.progress import Progress
from vocabtrim_export.random_weights.models import HEAD_SHAPES, SHAPES, random_head, random_source
from vocabtrim_export.sources.rotation import context_length
from vocabtrim_export.sources.source import DTYPES, Source
from vocabtrim_export.tracing.trace import Traced, trace


@dataclass(frozen=True, slots=True)
class RandomSettings:
    """The random bundles to create.

    Attributes:
        shape: The target's shape, a key of `SHAPES`.
        drafter_shape: A shape of `SHAPES`, or of `HEAD_SHAPES` for EAGLE-3 heads; None: the target's model.
        drafter_rows: The rows of each drafter's LM head; None for all.
        dtype: The dtype of all bundles.
        quantize: The target's quantisation.
        quantize_drafter: The drafters' quantisation; None: as `quantize`.
        max_length: Tokens that the KV caches hold.
    """

    shape: str
    drafter_shape: str | None = None
    drafter_rows: tuple[int | None, ...] = (None,)
    dtype: str = "fp32"
    quantize: Quantization = "none"
    quantize_drafter: Quantization | None = None
    max_length: int = 1024


@dataclass(frozen=True, slots=True)
class RandomBundles:
    """The directories of the bundles.

    Attributes:
        target: The target's.
        drafters: The drafters' by their rows in words, "8192 rows" or "full".
    """

    target: Path
    drafters: Mapping[str, Path]


def random_bundles(settings: RandomSettings, directory: Path, progress: Progress) -> RandomBundles:
    """Write a target and its drafters into `directory`, or use those that an earlier call with these settings wrote.

    Drafters of the target's model share its KV cache where both have one dtype. The target of an EAGLE-3 head computes
    the features that the head reads.

    Raises:
        VocabtrimError: A head has fewer rows than `drafter_rows` states, the drafter is not for this target, or disk or
            memory cannot hold the bundles.
    """
    target, drafter = _sources(settings)
    _check_rows(drafter, settings.drafter_rows)
    for source in (target, drafter):
        context_length(source.name, source.model, settings.max_length)
    plans = _plans(target, drafter, settings)
    missing = [name for name in plans if not _is_whole(directory / name)]
    twins = _twins(plans, missing)
    _check_room(settings.shape, directory, plans, missing)
    traced: dict[str, Traced] = {}
    for name in missing:
        plan = plans[name]
        if plan.source.name not in traced:
            progress("trace", 0, 1)
            dtype = DTYPES[plan.dtype]
            traced = {plan.source.name: trace(plan.source.model, dtype, plan.context_length, plan.features_given)}
            progress("trace", 1, 1)
        twin = directory / twins[name] if name in twins else None
        with replacing([directory / name]) as (fresh,):
            write_bundle(fresh, traced[plan.source.name], plan, progress, twin)
    target_path, *drafters = (directory / name for name in plans)
    labels = ["full" if rows is None else f"{rows} rows" for rows in settings.drafter_rows]
    return RandomBundles(target_path, dict(zip(labels, drafters, strict=True)))


def _sources(settings: RandomSettings) -> tuple[Source, Source]:
    """Returns the target and the drafter, which may be one model."""
    target = random_source(SHAPES[settings.shape])
    name = settings.drafter_shape or settings.shape
    if head := HEAD_SHAPES.get(name):
        if head.target != settings.shape:
            raise VocabtrimError(f"{name} is a head for {head.target}, not for {settings.shape}")
        return target, random_head(head, target)
    if name == settings.shape:
        return target, target
    drafter = random_source(SHAPES[name])
    if drafter.vocab_size != target.vocab_size:
        raise VocabtrimError(f"{name} cannot draft for {settings.shape}: their vocabularies differ")
    return target, drafter


def _check_rows(drafter: Source, wanted: tuple[int | None, ...]) -> None:
    available = len(drafter.row_token_ids) if isinstance(drafter, HeadSource) else drafter.vocab_size
    for rows in wanted:
        if rows is not None and rows > available:
            raise VocabtrimError(f"--k {rows} is more than the {available} rows that {_shape_of(drafter)} has")


def _plans(target: Source, drafter: Source, settings: RandomSettings) -> dict[str, BundlePlan]:
    """Returns the plans of the bundles by the names of their directories, the target's first."""
    dtype, context = settings.dtype, settings.max_length

    def name(source: Source, role: Role, quantization: Quantization, what: str) -> str:
        return "-".join([_shape_of(source), dtype, str(context), role, quantization]) + what

    features = drafter.feature_layers if isinstance(drafter, HeadSource) else ()
    plan = BundlePlan("target", target, dtype, settings.quantize, context, features_given=features)
    plans = {name(target, "target", settings.quantize, f"-for-{_shape_of(drafter)}" if features else ""): plan}
    quantization = settings.quantize_drafter or settings.quantize
    for rows in settings.drafter_rows:
        plan = BundlePlan("drafter", drafter, dtype, quantization, context, _kept(drafter, rows))
        plans[name(drafter, "drafter", quantization, f"-{rows or 'full'}")] = plan
    return plans


def _kept(drafter: Source, rows: int | None) -> VocabMap | None:
    """Returns the first `rows` tokens that the drafter's LM head has; None for all of the vocabulary."""
    if isinstance(drafter, HeadSource):
        return VocabMap.from_ids(drafter.row_token_ids[:rows], drafter.vocab_size)
    return None if rows is None else VocabMap.from_ids(range(rows), drafter.vocab_size)


def _shape_of(source: Source) -> str:
    return source.name.rpartition(" ")[2]


def _is_whole(bundle: Path) -> bool:
    """Returns whether the bundle exists, undamaged and in this version's format."""
    try:
        read_bundle(bundle)
    except VocabtrimError:
        return False
    return True


def _twins(plans: Mapping[str, BundlePlan], missing: list[str]) -> dict[str, str]:
    """Returns for each missing bundle an earlier one that differs from it in the LM head alone."""
    twins, there = {}, [name for name in plans if name not in missing]
    for name in missing:
        for other in there:
            a, b = plans[name], plans[other]
            if a.source is b.source and a.quantization == b.quantization:
                twins[name] = other
        there.append(name)
    return twins


def _check_room(shape: str, directory: Path, plans: Mapping[str, BundlePlan], missing: list[str]) -> None:
    """Check that the disk can hold what is `missing`, and the memory what all `plans` read.

    Raises:
        VocabtrimError: They cannot.
    """
    directory.mkdir(parents=True, exist_ok=True)
    disk = sum(_bytes(plans[name]) for name in missing)
    memory = sum(_bytes(plan) for plan in plans.values())
    free = shutil.disk_usage(directory).free
    checks = ("disk space", len(missing), disk, free), ("memory", len(plans), memory, available_memory())
    for what, count, needed, room in checks:
        if needed > room:
            raise VocabtrimError(
                f"{shape} needs {needed / 1e9:.1f} GB of {what} for {count} bundles and there are {room / 1e9:.1f}: "
                "use --dtype fp16, --quantize int4 or fewer --k"
            )


def _bytes(plan: BundlePlan) -> float:
    rows = None if plan.vocab_map is None else len(plan.vocab_map)
    return bundle_bytes(plan.source.model, plan.dtype, plan.quantization, rows)
