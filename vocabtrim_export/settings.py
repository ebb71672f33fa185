"""`ExportSettings`, and the checks of combinations that are refused before the long work."""

from dataclasses import dataclass, field
from typing import Literal

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.counting import CalibrationInput, CalibrationSettings
from vocabtrim_export.formats import FORMATS, check_formats
from vocabtrim_export.lowering.quantize import Quantization
from vocabtrim_export.selection import Coverage, check_k
from vocabtrim_export.sources.head_kinds import HEAD_KINDS
from vocabtrim_export.trt.bundle import check_buildable
from vocabtrim_export.trt.settings import TensorRTSettings


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Settings of an export; the command line's options have the same names.

    Attributes:
        k: Rows of the drafter's head: a number, a `Coverage` of the held-out calibration tokens, or "auto": the number
            with the most expected tokens per second, by the target's text on held-out prompts and this machine's
            measured steps.
        trt: Settings for TensorRT plans; None exports for ONNX Runtime.
        dtype: "fp32", "fp16" or "bf16", for both bundles; None: fp16 for TensorRT, fp32 for ONNX Runtime.
        quantize: The quantisation of both bundles' weights.
        quantize_drafter: The same for the drafter alone; None: as `quantize`.
        max_length: Tokens that the KV caches hold; None: the models' own context, at most 4,096.
        formats: Keys of `vocabtrim_export.formats.FORMATS`, written in addition to the bundles.
        slots: In-context slots of the drafter's head: it can also propose this many of the tokens that it lacks, those
            that appeared in the text last. The head gets at most as many slots as it loses tokens; 0 for none. None:
            the number that `k="auto"` chooses, else none.
        calibration: The token counts, or how to count, to choose the tokens.
        force: Replace an earlier export in the output directory.
    """

    k: int | Coverage | Literal["auto"]
    trt: TensorRTSettings | None = None
    dtype: str | None = None
    quantize: Quantization = "none"
    quantize_drafter: Quantization | None = None
    max_length: int | None = None
    formats: tuple[str, ...] = ()
    slots: int | None = None
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    force: bool = False

    @property
    def weights_dtype(self) -> str:
        """The dtype of both bundles: "fp32", "fp16" or "bf16"."""
        return self.dtype or ("fp16" if self.trt else "fp32")


def check_settings(settings: ExportSettings, drafter: str, target: str | None, head: str | None) -> None:
    """Check the settings before anything is loaded.

    Args:
        settings: The settings of the export.
        drafter: MODEL of the drafter.
        target: MODEL of the target; None where the drafter is exported alone.
        head: The kind of head that the drafter is; None for a language model.

    Raises:
        VocabtrimError: The settings contradict each other, or a format cannot hold such an export.
    """
    if settings.k != "auto":
        check_k(settings.k)
    kind = head or "language-model"
    check_formats(settings.formats, target is not None, settings.trt is not None, kind, settings.weights_dtype)
    if settings.trt is not None:
        drafters = settings.quantize_drafter or settings.quantize
        check_buildable(settings.trt, {settings.weights_dtype, settings.quantize, drafters})
    elif "fp8" in (settings.quantize, settings.quantize_drafter):
        raise VocabtrimError("ONNX Runtime has no fp8 products on the CPU: use int8 or int4, or --format trt")
    _check_slots(settings, kind)
    if head:
        _check_head(drafter, target, settings)


def _check_slots(settings: ExportSettings, kind: str) -> None:
    if settings.slots is None:
        return
    if settings.slots < 0:
        raise VocabtrimError(f"--slots is {settings.slots}: give the number of slots, or 0 for none")
    if settings.slots and (refused := slots_refused(settings, kind)):
        raise VocabtrimError(refused)


def slots_refused(settings: ExportSettings, kind: str) -> str | None:
    """Returns why this export cannot have slots; None where it can."""
    graphs = [name for name in settings.formats if FORMATS[name].needs_graph]
    if graphs:
        return f"--format {graphs[0]} cannot hold --slots: only bundles of --format onnx and --format trt can"
    if kind in HEAD_KINDS and not HEAD_KINDS[kind].has_slots:
        return f"{HEAD_KINDS[kind].title} cannot have --slots yet: only language models, EAGLE and layer heads can"
    return None


def _check_head(drafter: str, target: str | None, settings: ExportSettings) -> None:
    if target is None:
        raise VocabtrimError(f"{drafter} is a head, which reads its target's hidden states: give --target too")
    if settings.trt is not None:
        raise VocabtrimError("heads run on ONNX Runtime only so far: leave --format trt out")
    if settings.calibration.calibration_source == "drafter":
        raise VocabtrimError("a head generates nothing by itself: use --calibration-source target or text")


def check_auto(settings: ExportSettings, kind: str | None, target: str | None, data: CalibrationInput) -> None:
    """Refuse `k="auto"` for a pair that it cannot measure.

    Raises:
        VocabtrimError: The pair has a head, no target, no text, or another runtime than the CPU's.
    """
    how = "; give K as a number or a coverage"
    if kind is not None:
        raise VocabtrimError(f"--k auto is for drafters that are language models, not for heads{how}")
    if target is None:
        raise VocabtrimError(f"--k auto replays the target's own text and needs --target{how}")
    if data.counts:
        raise VocabtrimError(f"--k auto replays held-out prompts, and token counts hold none: give text{how}")
    if settings.trt is not None or settings.weights_dtype == "bf16":
        raise VocabtrimError(f"--k auto measures steps on the CPU, where TensorRT and bf16 do not run{how}")
