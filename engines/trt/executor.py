"""`TensorRTExecutor`: the plans of a bundle on one GPU, on one stream, over one KV cache."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.base import DeviceName
from engines.bundle.graph_io import (
    ATTENDED_SLOTS,
    INPUT_IDS,
    LOGITS,
    LOGITS_POSITIONS,
    POSITION_IDS,
    SLOT_WEIGHT,
)
from engines.bundle.read import DRAFT_MODEL_NAME, DRAFT_PLAN_NAME, MODEL_NAME, PLAN_NAME, Bundle, Profile, TensorRT
from engines.cuda import runtime as cuda
from engines.cuda.slots import DeviceSlots
from engines.errors import VocabtrimError
from engines.outputs import StepOutput
from engines.slots import open_head_rows
from engines.trt.bound import BoundProfile, KVCache, Shared
from engines.trt.engine import Executor
from engines.trt.library import Library, Log, load_library, make_log
from engines.trt.plan import check_plans, open_engine, stored_dtype, tensor_names

Which = Literal["model", "draft"]


class TensorRTExecutor(Executor):
    """Runs `model.engine` and, where the bundle has one, `draft.engine`. One call runs at a time.

    What a step returns is valid until the next one.

    Raises:
        VocabtrimError: The library, its version or the GPU is not what the plans were built for.
    """

    device: DeviceName = "cuda"

    def __init__(self, bundle: Bundle, write: Callable[[str], None] | None = None) -> None:
        plans = bundle.manifest.tensorrt
        if plans is None or plans.flavor == "none":
            raise VocabtrimError(f"{bundle.path} holds no TensorRT plans: export it with --format trt")
        library = load_library(plans.flavor, to_run=True)
        check_plans(plans, library.version, cuda.current_gpu().compute_capability, str(bundle.path))
        self._plans = plans
        self._bound: dict[tuple[Which, int], BoundProfile] = {}
        log = make_log(library, write)
        with ExitStack() as owned:
            stream = cuda.CudaStream()
            owned.callback(stream.destroy)
            self._runtime = library.api.Runtime(log)  # must outlive its engines
            self._engines = _open(bundle, plans, library, self._runtime, log)
            owned.callback(self._engines.clear)
            activation = cuda.allocate_device(max(e.device_memory_size_v2 for e in self._engines.values()))
            owned.callback(activation.free)
            self._shared = Shared(library, log, stream, activation)
            self._cache = KVCache.allocate(library, self._engines["model"], stream)
            owned.callback(self._free_cache)
            self.slots = self._open_slots(bundle, owned)
            self._addresses = {**self._cache.addresses, **(self.slots.addresses if self.slots else {})}
            self._owned = owned.pop_all()

    @property
    def cuda_graphs(self) -> int:
        """The number of profiles that run as a CUDA graph."""
        return sum(bound.has_graph for bound in self._bound.values())

    def environment(self) -> dict[str, str]:
        return {self._shared.library.name: self._shared.library.version} | cuda.environment()

    def step(
        self,
        profile: Profile,
        input_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_positions: NDArray[np.int64],
    ) -> StepOutput:
        """Run one profile of `model.engine`; see `Executor.step`."""
        bound = self._profile("model", self._plans.profiles.index(profile))
        bound.inputs[INPUT_IDS][:] = input_ids.reshape(-1)
        bound.inputs[POSITION_IDS][:] = position_ids.reshape(-1)
        bound.inputs[LOGITS_POSITIONS][:] = logits_positions.reshape(-1)
        return StepOutput(bound.run(), bound.read_logits)

    def draft(self, span: int, input_ids: NDArray[np.int64], position_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Run `draft.engine`; see `Executor.draft`."""
        if not self._plans.draft_length:
            raise ValueError("the bundle has no draft.engine")
        bound = self._profile("draft", self._plans.spans.index(span))
        bound.inputs[INPUT_IDS][:] = input_ids.reshape(-1)
        bound.inputs[POSITION_IDS][:] = position_ids.reshape(-1)
        return bound.run()

    def close(self) -> None:
        self._owned.close()

    def _profile(self, which: Which, index: int) -> BoundProfile:
        """Returns the profile, which is bound when it is first used."""
        bound = self._bound.get((which, index))
        if bound is None:
            bound = BoundProfile(self._shared, self._engines[which], index, self._addresses)
            if (slots := bound.inputs.get(ATTENDED_SLOTS)) is not None:
                slots[:] = np.arange(len(slots))
            self._bound[which, index] = bound
        return bound

    def _open_slots(self, bundle: Bundle, owned: ExitStack) -> DeviceSlots | None:
        """Returns the slots of the plans, in memory that `owned` frees; None where they have none."""
        engine, library, stream = self._engines["model"], self._shared.library, self._shared.stream
        names = tensor_names(library, engine, inputs=True)
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        rows = open_head_rows(bundle, shapes, engine.get_tensor_shape(LOGITS)[-1])
        if rows is None or bundle.vocab_map is None:
            return None

        def allocate(size: int) -> int:
            memory = cuda.allocate_device(size)
            owned.callback(memory.free)
            return memory.address

        hidden, count = shapes[SLOT_WEIGHT]
        dtype = stored_dtype(engine, SLOT_WEIGHT)
        return DeviceSlots(bundle.vocab_map, rows, (hidden, count), dtype, stream, allocate)

    def _free_cache(self) -> None:
        """Free the cache and, before it, all that is bound to its addresses."""
        while self._bound:
            self._bound.popitem()[1].close()
        self._cache.memory.free()


def _open(bundle: Bundle, plans: TensorRT, library: Library, runtime: Any, log: Log) -> dict[Which, Any]:
    """Returns the ICudaEngines of a bundle."""
    files: dict[Which, tuple[str, str]] = {"model": (PLAN_NAME, MODEL_NAME)}
    if plans.draft_length:
        files["draft"] = DRAFT_PLAN_NAME, DRAFT_MODEL_NAME
    engines: dict[Which, Any] = {}
    for which, (plan, model) in files.items():
        weights = bundle.path / model if plans.weights_stripped else None
        engines[which] = open_engine(library, runtime, log, bundle.path / plan, weights)
    return engines
