"""Loads bundles of TensorRT plans on a GPU."""

from pathlib import Path

from engines.base import Engine, Neighbour
from engines.bundle.read import Bundle
from engines.errors import VocabtrimError
from engines.refusals import refuse_profile
from engines.trt.engine import StaticEngine
from engines.trt.executor import TensorRTExecutor
from engines.trt.plan_proof import prove_plan


def load(bundle: Bundle, neighbour: Neighbour, profile: Path | None) -> Engine:  # noqa: ARG001  (it shares nothing)
    """Load a bundle of `--format trt`, whose plan proves itself first; see `engines.load.load_engine`.

    Raises:
        VocabtrimError: The bundle holds no plan, or a plan that this TensorRT and GPU cannot run, or whose proof fails.
    """
    plans = bundle.manifest.tensorrt
    refuse_profile(profile)
    if plans is None or plans.flavor == "none":
        raise VocabtrimError(f"{bundle.path} holds no TensorRT plan: export it with --format trt, or use device 'cpu'")
    engine = StaticEngine(bundle, TensorRTExecutor(bundle))
    try:
        prove_plan(bundle, engine)
    except BaseException:
        engine.close()
        raise
    return engine
