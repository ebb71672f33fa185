"""How to export, and what cannot go together: refused before the long work."""

from dataclasses import dataclass, field
from typing import Literal

from engines.bundle.read import Kind
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.counting import CalibrationInput, CalibrationSettings
from vocabtrim_export.formats import FORMATS, check_formats
from vocabtrim_export.lowering.quantize import Quantization
from vocabtrim_export.selection import Coverage
from vocabtrim_export.trt.bundle import check_buildable
from vocabtrim_export.trt.settings import TensorRTSettings


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How to export; the command line's options by the same names.

    k: rows of the drafter's head: a number, a `Coverage` of the held-out calibration tokens, or "auto": what should
    give the most tokens per second, by the target's text on held-out prompts and by this machine's measured steps.
    trt: how to build TensorRT plans; None exports for ONNX Runtime.
    dtype: "fp32", "fp16" or "bf16", of both bundles; None: fp16 for TensorRT, fp32 for ONNX Runtime.
    quantize_drafter: None does as `quantize` says.
    max_length: tokens that the KV caches hold; None: what the models were made for, at most 4,096.
    formats: of `vocabtrim_export.formats`, written beside the bundles.
    slots: in-context slots of the drafter's head: so many tokens that it lacks can be proposed nevertheless, those that
    the text had last. As many as the head loses at most; 0 for none. None: what `k="auto"` chooses, else none.
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
        return self.dtype or ("fp16" if self.trt else "fp32")


def check_format(settings: ExportSettings, has_target: bool, kind: Kind) -> None:
    """Refuse before the long work what a format cannot hold."""
    check_formats(settings.formats, has_target, settings.trt is not None, kind, settings.weights_dtype)
    if settings.trt is not None:
        drafters = settings.quantize_drafter or settings.quantize
        check_buildable(settings.trt, {settings.weights_dtype, settings.quantize, drafters})
    elif "fp8" in (settings.quantize, settings.quantize_drafter):
        raise VocabtrimError("ONNX Runtime has no fp8 products on the CPU: use int8 or int4, or --format trt")


def check_slots(settings: ExportSettings, kind: Kind) -> None:
    if settings.slots is None:
        return
    if settings.slots < 0:
        raise VocabtrimError(f"--slots is {settings.slots}: give the number of slots, or 0 for none")
    if settings.slots and (refused := slots_refused(settings, kind)):
        raise VocabtrimError(refused)


def slots_refused(settings: ExportSettings, kind: Kind) -> str | None:
    """Why this export cannot have slots; None where it can."""
    graphs = [name for name in settings.formats if FORMATS[name].needs_graph]
    if settings.trt is not None or graphs:
        name = "trt" if settings.trt is not None else graphs[0]
        return f"--format {name} cannot hold --slots: only bundles of --format onnx can"
    if kind == "medusa":
        return "Medusa heads cannot have --slots yet: only language models, EAGLE and layer heads can"
    if settings.weights_dtype == "bf16":
        return "--slots is for the CPU so far, which has no bf16 products: give --dtype fp32 or fp16"
    return None


def check_head(drafter: str, target: str | None, settings: ExportSettings) -> None:
    if target is None:
        raise VocabtrimError(f"{drafter} is a head, which reads its target's hidden states: give --target too")
    if settings.trt is not None:
        raise VocabtrimError("heads run on ONNX Runtime only so far: leave --format trt out")
    if settings.calibration.calibration_source == "drafter":
        raise VocabtrimError("a head generates nothing by itself: use --calibration-source target or text")


def check_auto(settings: ExportSettings, kind: Kind | None, target: str | None, given: CalibrationInput) -> None:
    how = "; give K as a number or a coverage"
    if kind is not None:
        raise VocabtrimError(f"--k auto is for drafters that are language models, not for heads{how}")
    if target is None:
        raise VocabtrimError(f"--k auto replays the target's own text and needs --target{how}")
    if given.corpus is None:
        raise VocabtrimError(f"--k auto replays held-out prompts, and token counts hold none: give text{how}")
    if settings.trt is not None or settings.weights_dtype == "bf16":
        raise VocabtrimError(f"--k auto measures steps on the CPU, where TensorRT and bf16 do not run{how}")
