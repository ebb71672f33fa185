"""`OnnxRuntimeEngine`: a bundle on ONNX Runtime, with everything it touches bound once."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.base import MAX_KEEP, Engine
from engines.bundle.graph_io import (
    ATTENTION_PADDING,
    FEATURES_OUTPUT,
    HIDDEN_INPUT,
    HIDDEN_OUTPUT,
    INPUT_IDS,
    KEEP,
    LOGITS,
    PAST,
    POSITION_IDS,
    SEQLENS_K,
    SLOT_WEIGHT,
    TOKEN_IDS,
    TOTAL_LENGTH,
    present_name,
)
from engines.bundle.head_rows import HeadRows
from engines.bundle.read import Bundle
from engines.bundle.vocab_map import VocabMap
from engines.keys_values import KeysValues
from engines.ort.calls import Call, plan_calls
from engines.ort.key_tiles import UNCUT, KeyTiles
from engines.ort.padding import NO_PADDING, Padding
from engines.ort.session import host_array, numpy_dtype, share
from engines.ort.step import HostStep, Step
from engines.outputs import StepOutput, join_outputs
from engines.slots import Slots, open_head_rows

CHUNK = MAX_KEEP
CACHED_LENGTHS = 32  # step lengths (drafts, catch-ups, verifications) whose bindings are kept


class OnnxRuntimeEngine(Engine):
    """Runs on the CPU. Each layer's keys and values live in one buffer, bound as past and as present.

    Args:
        bundle: The bundle.
        session: A session on the bundle's model.
        shared: An engine whose KV cache to use instead of an own one; the caches must be of one form and on one device.
        padding: The rows that are computed in addition; none on a GPU, whose kernels are others.

    A quantised target gives a token the same logits, bit for bit, in a step of any length: see `Padding`. A row of
    padding is the last token once more, or zeros in attention alone. Its keys and values lie after the cached tokens,
    where the next step overwrites them; the cache holds a token less for it.

    Attributes:
        traces: The sessions that trace their operators, by the files that the traces go to when the engine is closed.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: ort.InferenceSession,
        shared: "OnnxRuntimeEngine | None" = None,
        padding: Padding = NO_PADDING,
    ) -> None:
        super().__init__(bundle.manifest, bundle.vocab_map, bundle.tokenizer_file)
        self._bundle, self._session = bundle, session
        self._caches: dict[str, ort.OrtValue] = dict(shared._caches) if shared else self._allocate_caches()
        self.cache = shared.cache if shared else self.cache
        self._padding, is_padded = padding, padding != NO_PADDING
        self._tiles = KeyTiles.of(bundle.manifest.head_dim) if is_padded else UNCUT
        self.capacity -= is_padded
        self._seqlens = np.zeros(1, np.int32)
        # The number of tokens that the kernels reserve for: those so far on the CPU, always the capacity on CUDA.
        self._total = np.full(1, self.capacity, np.int32)
        self._steps: dict[tuple[int, int], Step] = {}
        # position_ids are absent where attention counts by itself
        names = [value.name for value in self._session.get_inputs()]
        self._token_inputs = [name for name in (INPUT_IDS, POSITION_IDS, SEQLENS_K) if name in names]
        (logits,) = (output for output in self._session.get_outputs() if output.name == LOGITS)
        self._head_rows = int(logits.shape[-1])
        self.logits_type: str = logits.type
        self.slots = self._open_slots()
        self.traces: Mapping[Path, ort.InferenceSession] = {}
        self._hidden = {
            value.name: (int(value.shape[-1]), numpy_dtype(value.type))
            for value in [*self._session.get_inputs(), *self._session.get_outputs()]
            if value.name in (FEATURES_OUTPUT, HIDDEN_INPUT, HIDDEN_OUTPUT)
        }
        self.features_given = bundle.manifest.feature_size if FEATURES_OUTPUT in self._hidden else 0

    def rows_computed(self, rows: int) -> int:
        return self._padding.step_rows(rows)

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        return self._feed(token_ids, keep)

    def _feed(
        self, token_ids: Sequence[int] | NDArray[np.int64], keep: int, features: NDArray[np.float32] | None = None
    ) -> StepOutput:
        """Feed as `feed` and `feed_features` do; `features` is what a head reads, float32[n, features_read]."""
        self.use.check_open()
        ids = np.asarray(token_ids, np.int64)
        self.check_feed(len(ids), keep)
        calls = plan_calls(ids, keep, self.length, CHUNK, self._tiles, features)
        outputs: list[StepOutput] = []
        for call in calls:
            if outputs:  # a long prompt takes many calls
                self.use.check_wanted()
            outputs.append(self._execute(self._step(len(call.ids), call.predicted), call))
        return join_outputs(outputs)

    def fork(self, share_cache_with: Engine | None = None) -> Engine:
        """Fork as `Engine.fork` does: a session runs for several threads, and what is bound is each engine's own."""
        if self.device != "cpu":
            return super().fork(share_cache_with)
        shared = share_cache_with if isinstance(share_cache_with, OnnxRuntimeEngine) else None
        return OnnxRuntimeEngine(self._bundle, self._session, shared, self._padding)

    def snapshot(self) -> KeysValues:
        self.use.check_open()
        arrays = {name: self._read_cache(cache, self.length) for name, cache in self._caches.items()}
        return KeysValues(self.length, arrays)

    def restore(self, copied: KeysValues, length: int) -> None:
        self.use.check_open()
        self.rewind(0)  # a copy that breaks off leaves nothing to build on
        for name, cache in self._caches.items():
            self._write_cache(cache, copied.arrays[name][:, :, :length])
        self.length = length

    def environment(self) -> dict[str, str]:
        return {"onnxruntime": ort.__version__}

    def _release(self) -> None:
        for path, session in self.traces.items():
            os.replace(session.end_profiling(), path)
        self.traces = {}
        self._steps.clear()
        self._caches.clear()
        if hasattr(self, "_session"):
            del self._session

    def _execute(self, step: Step, call: Call) -> StepOutput:
        count, end = len(call.ids), self.length + step.written
        step.input_ids[0, :count] = call.ids
        step.input_ids[0, count:] = call.ids[-1]
        step.position_ids[0] = np.arange(self.length, self.length + step.input_ids.shape[1])
        step.seqlens_k[0] = end - 1
        step.run(end)
        if self.vocab_map is None and isinstance(step, HostStep):
            step.check_chosen()
        self.length += count
        features = step.features_reader(copied=not call.is_last)
        if call.is_last:
            return StepOutput(step.token_ids[0], step.read_logits, features)
        return StepOutput(step.token_ids[0, : call.keep], step.read_logits, features).copied()

    def _step(self, length: int, keep: int) -> Step:
        step = self._steps.get((length, keep))
        if step is None:
            step = self._bind(length, keep)
            if length <= CACHED_LENGTHS or length == CHUNK:
                self._steps[length, keep] = step
        return step

    def _bind(self, length: int, keep: int) -> Step:
        rows = self.rows_computed(length)
        kept = self.rows_computed(keep + rows - length)  # of the head's product
        step = HostStep(
            self._session,
            self._bind_common(kept),
            np.zeros((1, rows), np.int64),
            np.zeros((1, rows), np.int64),
            self._seqlens,
            np.zeros((1, kept), np.int64),
            self._total,
            np.zeros((1, kept, self._head_rows), numpy_dtype(self.logits_type)),
            {name: np.zeros((1, rows, size), dtype) for name, (size, dtype) in self._hidden.items()},
            self._padding.attention_rows(length),
        )
        for name in self._token_inputs:
            step.binding.bind_ortvalue_input(name, share(getattr(step, name)))
        for name in (LOGITS, TOKEN_IDS):
            step.binding.bind_ortvalue_output(name, share(getattr(step, name)))
        for name, array in step.hidden.items():
            bind = step.binding.bind_ortvalue_input if name == HIDDEN_INPUT else step.binding.bind_ortvalue_output
            bind(name, share(array))
        if step.attention_padding:
            step.binding.bind_ortvalue_input(ATTENTION_PADDING, share(np.array([step.attention_padding], np.int64)))
        return step.without_padding(length, keep)

    def _bind_common(self, keep: int) -> ort.IOBinding:
        """Returns a binding of what all lengths share: the cache, and the numbers that kernels read on the host."""
        binding = self._session.io_binding()
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(present_name(name), cache)
        binding.bind_ortvalue_input(KEEP, share(np.array([keep], np.int64)))
        binding.bind_ortvalue_input(TOTAL_LENGTH, share(self._total))
        self._bind_slots(binding)
        return binding

    def _bind_slots(self, binding: ort.IOBinding) -> None:
        for name, array in (self.slots.inputs if self.slots else {}).items():
            binding.bind_ortvalue_input(name, share(array))

    def _open_slots(self) -> Slots | None:
        """Returns the slots of the graph; None if it has none.

        Raises:
            VocabtrimError: They are not those of the manifest.
        """
        inputs = {value.name: value for value in self._session.get_inputs()}
        rows = open_head_rows(self._bundle, {name: value.shape for name, value in inputs.items()}, self._head_rows)
        if rows is None or self.vocab_map is None:
            return None
        hidden, count = inputs[SLOT_WEIGHT].shape
        return self._make_slots(self.vocab_map, rows, (hidden, count), inputs[SLOT_WEIGHT].type)

    def _make_slots(self, vocab_map: VocabMap, rows: HeadRows, shape: tuple[int, int], onnx_type: str) -> Slots:
        return Slots(vocab_map, rows, shape, numpy_dtype(onnx_type))

    def _allocate_caches(self) -> dict[str, ort.OrtValue]:
        caches = {}
        for value in self._session.get_inputs():
            if value.name.startswith(PAST):
                _, heads, _, size = value.shape
                caches[value.name] = self._allocate_cache((1, heads, self.capacity, size), value.type)
        return caches

    def _allocate_cache(self, shape: tuple[int, ...], onnx_type: str) -> ort.OrtValue:
        """Returns zeros, because a masked slot weighs 0 in attention, but 0 times a NaN of old memory is NaN."""
        return share(np.zeros(shape, numpy_dtype(onnx_type)))

    def _read_cache(self, cache: ort.OrtValue, length: int) -> NDArray[np.generic]:
        """Returns a copy of the first `length` tokens of keys or values."""
        return host_array(cache)[:, :, :length].copy()

    def _write_cache(self, cache: ort.OrtValue, rows: NDArray[np.generic]) -> None:
        """Overwrite the first tokens of keys or values."""
        host_array(cache)[:, :, : rows.shape[2]] = rows
