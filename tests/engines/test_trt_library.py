"""TensorRT without a GPU: the libraries as they load, and the executor on a CUDA and an engine that are simulated."""

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from engines.bundle.read import Bundle, Profile, TensorRT
from engines.bundle.vocab_map import VocabMap
from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError
from engines.outputs import StepOutput
from engines.trt import executor
from engines.trt.bound import to_float32
from engines.trt.library import Library, create_context, create_network, load_library, make_log
from engines.trt.plan import check_plans, open_engine

bindings = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

# ------------------------------------------------------------------------------------------------ loading the libraries


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'vocabtrim-export[trt-rtx]'")
    return load_library("rtx")


def test_rtx_loads(rtx):
    assert (rtx.flavor, rtx.name) == ("rtx", "TensorRT-RTX")
    assert rtx.version == rtx.api.__version__
    assert rtx.api.OnnxParser


def test_auto_takes_rtx_where_there_is_no_gpu(rtx, monkeypatch):
    monkeypatch.setattr(cuda, "has_device", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    assert load_library("auto").flavor == "rtx"


def test_auto_takes_tensorrt_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "has_device", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    assert load_library("auto").flavor == "tensorrt"


@pytest.mark.parametrize(
    ("flavor", "said"),
    [
        ("tensorrt", "TensorRT is not installed: pip install 'vocabtrim-export[trt]'"),
        ("rtx", "TensorRT-RTX is not installed: pip install 'vocabtrim-export[trt-rtx]'"),
        (
            "auto",
            "TensorRT and TensorRT-RTX are not installed: "
            "pip install 'vocabtrim-export[trt]' or 'vocabtrim-export[trt-rtx]'",
        ),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(flavor, said, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(VocabtrimError) as error:
        load_library(flavor)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libnvinfer.so.11: cannot\\nopen it')", "libnvinfer.so.11: cannot open it"),
        ("import tensorrt_libs_of_another_wheel", "No module named 'tensorrt_libs_of_another_wheel'"),
    ],
)
def test_a_library_that_does_not_load_says_why(code, said, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(VocabtrimError, match=rf"TensorRT is installed but does not load \({said}\): pip install"):
        load_library("tensorrt")


def test_a_tensorrt_without_kv_cache_update_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0", ICudaEngine=object))
    with pytest.raises(VocabtrimError, match=r"TensorRT 10\.9\.0 .* 10\.15 or newer"):
        load_library("tensorrt")


def test_the_lean_runtime_does_for_running_where_there_is_no_tensorrt(monkeypatch):
    lean = pytest.importorskip("tensorrt_lean", reason="needs pip install 'vocabtrim-export[trt-lean]'")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    library = load_library("tensorrt", to_run=True)
    assert (library.lean, library.api, library.name) == (True, lean, "TensorRT's lean runtime")
    with pytest.raises(VocabtrimError, match="TensorRT is not installed"):
        load_library("tensorrt")  # it builds nothing
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    assert not load_library("tensorrt", to_run=True).lean


def test_only_tensorrt_10_is_told_that_networks_are_strongly_typed():
    builder = SimpleNamespace(create_network=lambda flags: flags)
    api = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    assert create_network(Library("tensorrt", "10.16.1.11", api), builder) == 2
    assert create_network(Library("tensorrt", "11.4.0.3", api), builder) == 0
    assert create_network(Library("rtx", "1.7.1.116", api), builder) == 0


USES = {
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_execution_context device_memory_size_v2 get_aliased_input_tensor get_tensor_dtype "
    "get_tensor_mode get_tensor_name get_tensor_profile_shape get_tensor_shape num_io_tensors",
    "IExecutionContext": "execute_async_v3 get_tensor_shape infer_shapes is_stream_capturable set_device_memory "
    "set_input_shape set_optimization_profile_async set_tensor_address",
    "TensorIOMode": "INPUT OUTPUT",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "DataType": "INT64 HALF BF16 FLOAT",
}
RTX_USES = {
    "Refitter": "refit_cuda_engine",
    "OnnxParserRefitter": "refit_from_file",
    "ICudaEngine": "create_runtime_config",
    "IRuntimeConfig": "set_execution_context_allocation_strategy dynamic_shapes_kernel_specialization_strategy",
}
LEAN_USES = {"BuilderFlag": "VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME"}  # of the worker, by the names of TensorRT
OPTIONAL = {"is_stream_capturable"}  # of TensorRT-RTX alone


@pytest.mark.parametrize(("module", "more"), [("tensorrt_rtx", RTX_USES), ("tensorrt_lean", LEAN_USES)])
def test_what_the_executor_uses_exists(module, more):
    """Nothing but a GPU would else show a wrong name."""
    api = pytest.importorskip(module, reason=f"needs {module}")
    missing = [
        f"{kind}.{name}"
        for uses in (USES, more)
        for kind, names in uses.items()
        for name in names.split()
        if not hasattr(getattr(api, kind), name) and not (name in OPTIONAL and module == "tensorrt_lean")
    ]
    assert not missing


def test_a_context_of_rtx_takes_our_memory_and_compiles_for_its_shapes_at_once(rtx):
    config = SimpleNamespace(
        set_execution_context_allocation_strategy=lambda strategy: setattr(config, "memory", strategy)
    )
    engine = SimpleNamespace(create_runtime_config=lambda: config, create_execution_context=lambda given: given)
    assert create_context(rtx, engine) is config
    assert config.memory == rtx.api.ExecutionContextAllocationStrategy.USER_MANAGED
    eager = rtx.api.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == eager


def fake_tensorrt():
    return SimpleNamespace(__version__="11.0.0", ICudaEngine=SimpleNamespace(get_aliased_input_tensor=None))


# ------------------------------------------------------------------------------------------ what libraries and CUDA say


def test_the_log_keeps_a_real_parsers_first_error_and_writes_every_line(rtx):
    lines = []
    log = make_log(rtx, lines.append)
    network = create_network(rtx, rtx.api.Builder(log))  # which its parser does not keep alive
    parser = rtx.api.OnnxParser(network, log)
    assert log.reason() == "it gave no reason"
    assert not parser.parse(b"not a model")
    assert "Failed to parse the ONNX model" in log.reason()
    assert any(line.startswith("[error] ") and "Failed to parse" in line for line in lines)
    log.clear()
    assert log.reason() == "it gave no reason"


def test_the_log_drops_noise_and_keeps_other_warnings(rtx):
    from onnx import TensorProto, helper

    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, 2]) for name in ("input_ids", "token_ids")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["input_ids", "input_ids"], ["token_ids"])], "g", ids[:1], ids[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    lines = []
    log = make_log(rtx, lines.append)
    builder = rtx.api.Builder(log)
    other = make_log(rtx, lines.append)
    rtx.api.Runtime(other)  # the library complains about a second logger
    network = create_network(rtx, builder)
    parser = rtx.api.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString())
    assert any("Parsing node" in line for line in lines)
    assert log.warnings == other.warnings == []
    assert not [line for line in lines if line.startswith("[warning]")]
    log.log(rtx.api.ILogger.Severity.WARNING, "something\nelse")
    assert log.warnings == ["something\nelse"]
    assert lines[-1] == "[warning] something\nelse"


def test_a_reason_is_one_line_of_bounded_length(rtx):
    log = make_log(rtx)
    log.log(rtx.api.ILogger.Severity.ERROR, "a\n b" + "c" * 500)
    log.log(rtx.api.ILogger.Severity.INTERNAL_ERROR, "what followed")
    assert log.reason().startswith("a bc")
    assert len(log.reason()) == 300


def test_a_file_that_is_no_plan_is_refused_with_the_librarys_reason(rtx, tmp_path):
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"garbage" * 100)
    log = make_log(rtx)
    with pytest.raises(VocabtrimError, match=rf"TensorRT-RTX cannot open {plan}: .*kEXPECTED_MAGIC_TAG failed"):
        open_engine(rtx, rtx.api.Runtime(log), log, plan, None)


def test_what_the_lean_runtime_cannot_open_is_said(rtx, tmp_path):
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"a plan")
    lean, log = replace(rtx, flavor="tensorrt", lean=True), make_log(rtx)
    opens_nothing = SimpleNamespace(deserialize_cuda_engine=lambda data: None)
    with pytest.raises(VocabtrimError, match=r"TensorRT's lean runtime cannot open .* exported with --version-compat"):
        open_engine(lean, opens_nothing, log, plan, None)
    opens_all = SimpleNamespace(deserialize_cuda_engine=lambda data: object())
    with pytest.raises(VocabtrimError, match="takes its weights at load, which TensorRT's lean runtime cannot"):
        open_engine(lean, opens_all, log, plan, tmp_path / "model.onnx")


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_plan_without_weights_takes_them_from_its_graph(rtx, tmp_path, succeeds):
    plan, graph = tmp_path / "model.engine", tmp_path / "model.onnx"
    plan.write_bytes(b"a plan")
    done = []

    def take(what, result=True):
        done.append(what)
        return result

    api = SimpleNamespace(
        Refitter=lambda engine, log: SimpleNamespace(refit_cuda_engine=lambda: take("refit", succeeds)),
        OnnxParserRefitter=lambda refitter, log: SimpleNamespace(refit_from_file=take),
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: take(bytes(data)))
    log = make_log(rtx)
    if succeeds:
        assert open_engine(replace(rtx, api=api), runtime, log, plan, graph)
    else:
        with pytest.raises(VocabtrimError, match=rf"cannot put the weights of {graph} into {plan}: it gave no reason"):
            open_engine(replace(rtx, api=api), runtime, log, plan, graph)
    assert done == [b"a plan", str(graph), "refit"]


def test_cuda_errors_that_a_user_can_mend_are_one_line():
    errors = bindings.cudaError_t
    assert cuda.check((errors.cudaSuccess,)) is None
    assert cuda.check((errors.cudaSuccess, 7)) == 7
    with pytest.raises(VocabtrimError, match=r"\(cudaErrorInsufficientDriver\): no NVIDIA driver"):
        cuda.check((errors.cudaErrorInsufficientDriver, None))
    with pytest.raises(VocabtrimError, match=r"asking for 1,234,567 bytes: lower --max-length"):
        cuda.check((errors.cudaErrorMemoryAllocation, None), asked=1234567)
    with pytest.raises(RuntimeError, match=r"cudaErrorInvalidValue: invalid argument"):
        cuda.check((errors.cudaErrorInvalidValue,))


@pytest.mark.skipif(cuda.has_device(), reason="there is a GPU here, so that CUDA does not fail")
@pytest.mark.parametrize("call", [cuda.current_gpu, cuda.CudaStream, lambda: cuda.allocate_device(8)])
def test_without_a_gpu_every_way_in_says_so(call):
    with pytest.raises(VocabtrimError, match="CUDA cannot be used"):
        call()


def test_missing_cuda_bindings_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(VocabtrimError, match=r"CUDA bindings are missing .* pip install cuda-bindings"):
        cuda.current_gpu()
    assert not cuda.has_device()


PLANS = TensorRT(
    flavor="rtx",
    version="1.7.1.116",
    compute_capabilities=("8.6", "8.9"),
    profiles=(Profile("draft", 2, 1, 8), Profile("verify", 3, 3, 8), Profile("draft", 2, 1, 16)),
    draft_length=4,
    weights_stripped=False,
)


def test_plans_run_only_where_they_were_built_for():
    check_plans(PLANS, "1.7.1.116", "8.9", "out/target")
    with pytest.raises(VocabtrimError, match=r"built by TensorRT-RTX 1\.7\.1\.116; 1\.8\.0\.3, which is installed"):
        check_plans(PLANS, "1.8.0.3", "8.9", "out/target")
    with pytest.raises(VocabtrimError) as error:
        check_plans(PLANS, "1.7.1.116", "9.0", "out/target")
    assert str(error.value) == (
        "out/target was built for GPUs of compute capability 8.6 or 8.9, this one has 9.0: "
        "build it again (vocabtrim-export … --format trt --compute-capability 9.0)"
    )
    with pytest.raises(VocabtrimError, match=r"TensorRT 11\.4.*on this machine"):
        check_plans(replace(PLANS, flavor="tensorrt", version="11.4.0"), "11.5.0", "8.9", "out/target")


def test_bfloat16_bits_become_the_float32_they_stand_for():
    bits = np.array([0x3F80, 0xC040, 0x0000, 0x7F80, 0x4049], np.uint16)
    assert to_float32(bits).tolist() == [1.0, -3.0, 0.0, np.inf, 3.140625]
    half = np.array([1.5, -2.25], np.float16)
    assert (to_float32(half).dtype, to_float32(half).tolist()) == (np.float32, [1.5, -2.25])
    assert to_float32(np.float32([0.1])).dtype == np.float32


# ------------------------------------------------------------------- the executor over host memory that plays the GPU's


class FakeCuda:
    """The calls of cuda.bindings.runtime that the executor makes, over host memory; a copy out of bounds fails."""

    cudaMemcpyKind, cudaStreamCaptureMode = bindings.cudaMemcpyKind, bindings.cudaStreamCaptureMode
    cudaStreamNonBlocking = bindings.cudaStreamNonBlocking
    OK = (bindings.cudaError_t.cudaSuccess,)

    def __init__(self):
        self.memory: dict[int, ctypes.Array] = {}
        self.live: set[str] = set()  # streams and graphs
        self.capturing: list | None = None
        self.launches = self.graphs = 0
        self.fail_malloc_at = None
        self.columns: list[int] = []  # bytes of a row of each copy of columns

    def array(self, address, dtype, shape):
        """The live memory at `address`, which need not be an allocation's start."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for start, buffer in self.memory.items():
            if start <= address and address + size <= start + len(buffer):
                return np.frombuffer(memoryview(buffer)[address - start :][:size], dtype).reshape(shape)
        raise AssertionError(f"{size} bytes at {address} are not allocated")

    def queue(self, work):
        (work() if self.capturing is None else self.capturing.append(work))
        return self.OK

    def cudaMalloc(self, size):
        if self.fail_malloc_at is not None:
            self.fail_malloc_at -= 1
            if self.fail_malloc_at < 0:
                return bindings.cudaError_t.cudaErrorMemoryAllocation, None
        assert self.capturing is None, "a capturing stream takes no allocation"
        buffer = (ctypes.c_ubyte * (size + cuda.ALIGNMENT))()
        ctypes.memset(buffer, 0xFF, len(buffer))  # NaN, as old memory may hold
        address = -(-ctypes.addressof(buffer) // cuda.ALIGNMENT) * cuda.ALIGNMENT
        self.memory[address] = (ctypes.c_ubyte * size).from_buffer(buffer, address - ctypes.addressof(buffer))
        return *self.OK, address

    def cudaFree(self, address):
        del self.memory[address]
        return self.OK

    cudaMallocHost, cudaFreeHost = cudaMalloc, cudaFree

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1
        self.live.add("stream")
        return *self.OK, bindings.cudaStream_t(4711)

    def cudaStreamDestroy(self, stream):
        self.live.remove("stream")
        return self.OK

    def cudaStreamSynchronize(self, stream):
        return self.OK

    def cudaMemsetAsync(self, address, value, size, stream):
        return self.queue(lambda: self.array(address, np.uint8, size).fill(value))

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert kind == self.cudaMemcpyKind.cudaMemcpyDefault
        if all(source not in range(start, start + len(memory)) for start, memory in self.memory.items()):  # pageable
            assert self.capturing is None, "a graph would read it when it is long gone"
            ctypes.memmove(self.array(target, np.uint8, size).ctypes.data, source, size)
            return self.OK
        return self.queue(lambda: ctypes.memmove(target, self.array(source, np.uint8, size).ctypes.data, size))

    def cudaMemcpy2DAsync(self, target, pitch, source, source_pitch, width, rows, kind, stream):
        assert (kind, pitch) == (self.cudaMemcpyKind.cudaMemcpyDefault, source_pitch)
        assert self.capturing is None, "a captured copy would be repeated"
        self.columns.append(width)
        for row in range(rows):
            to = self.array(target + row * pitch, np.uint8, width)
            to[:] = (ctypes.c_ubyte * width).from_address(source + row * pitch)
        return self.OK

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return self.OK

    def cudaStreamEndCapture(self, stream):
        work, self.capturing = self.capturing, None
        self.live.add("graph")
        return *self.OK, work

    def cudaGraphInstantiate(self, graph, flags):
        self.graphs += 1
        self.live.add(f"exec {self.graphs}")
        return *self.OK, (f"exec {self.graphs}", graph)

    def cudaGraphDestroy(self, graph):
        self.live.remove("graph")
        return self.OK

    def cudaGraphExecDestroy(self, graph):
        self.live.remove(graph[0])
        return self.OK

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in graph[1]:
            work()
        return self.OK

    def cudaGetErrorString(self, error):
        return *self.OK, b"said so"

    def cudaGetLastError(self):
        return self.OK


class FakeEngine:
    """A "decoder" of two kv heads: the keys are the token ids, and what follows is the sum of all up to a position."""

    device_memory_size_v2 = 1000

    def __init__(self, cuda_, profiles, outputs, slots=False):
        self.cuda, self.profiles, self.outputs = cuda_, profiles, outputs
        self.capturable = True
        self.fails = self.fails_while_capturing = False
        inputs = {"input_ids": "INT64", "position_ids": "INT64", "past_key_values.0.key": "HALF"}
        if "logits" in outputs:
            inputs["logits_positions"] = "INT64"
        if slots:
            inputs |= {"slot_weight": "HALF", "slot_token_ids": "INT64"}
        self.types = inputs | {"token_ids": "INT64", "logits": "BF16", "present.0.key": "HALF"}
        self.names = [*inputs, *outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return "out" if name in self.outputs else "in"

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.types[name])

    def get_tensor_shape(self, name):
        shapes = {"logits": (1, -1, 5), "slot_weight": (3, 2), "slot_token_ids": (2,)}
        return (1, 2, -1, 4) if name in ("past_key_values.0.key", "present.0.key") else shapes.get(name, (1, -1))

    def get_tensor_profile_shape(self, name, index):
        return [self.profiles[index][name]] * 3

    def get_aliased_input_tensor(self, name):
        return "past_key_values.0.key" if name == "present.0.key" else None

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.memory = engine, {}, {}, None
        if not engine.capturable:
            self.is_stream_capturable = lambda stream: False

    def set_optimization_profile_async(self, index, stream):
        self.profile = self.engine.profiles[index]
        return stream == 4711

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape == self.profile[name]

    def infer_shapes(self):
        return [name for name in self.engine.names if name not in self.engine.outputs and name not in self.shapes]

    def get_tensor_shape(self, name):
        return self.shapes.get(name) or self.profile[name]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address % cuda.ALIGNMENT == 0

    def set_device_memory(self, address, size):
        assert size >= self.engine.device_memory_size_v2
        self.memory = address

    def execute_async_v3(self, stream):
        assert self.memory in self.engine.cuda.memory
        assert set(self.addresses) == set(self.engine.names)
        if self.engine.fails or (self.engine.fails_while_capturing and self.engine.cuda.capturing is not None):
            return False
        self.engine.cuda.queue(self._compute)
        return True

    def _array(self, name):
        types = {"INT64": np.int64, "HALF": np.float16, "BF16": np.uint16}
        return self.engine.cuda.array(
            self.addresses[name], types[self.engine.types[name]], tuple(self.get_tensor_shape(name))
        )

    def _compute(self):
        ids, positions, cache = (self._array(x)[0] for x in ("input_ids", "position_ids", "past_key_values.0.key"))
        assert self.addresses["present.0.key"] == self.addresses["past_key_values.0.key"]
        cache[:, positions[0] : positions[0] + len(ids)] = ids[None, :, None]
        sums = np.cumsum(cache[1, :, 3].astype(np.float32))
        tokens = self._array("token_ids")[0]
        if "slot_weight" in self.engine.names:  # a filled slot adds the sum of its column
            sums += self._array("slot_weight").sum(0, where=self._array("slot_token_ids") >= 0).sum()
        if "logits" in self.engine.outputs:
            at = positions[self._array("logits_positions")]
            tokens[:] = sums[at]
            self._array("logits")[0] = (sums[at][:, None] + np.arange(5, dtype=np.float32)).view(np.uint32) >> 16
        else:
            tokens[:] = sums[positions[-1]] + np.arange(len(tokens))


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU: gpu.cuda, gpu.engines, and gpu.open() → the executor of a bundle of PLANS."""
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "runtime", lambda: fake)
    monkeypatch.setattr(cuda, "current_gpu", lambda: cuda.Gpu("a fake", "8.6"))
    past = {"past_key_values.0.key": (1, 2, 16, 4)}
    model = [
        past
        | {"input_ids": (1, p.tokens), "position_ids": (1, p.tokens), "logits_positions": (p.keep,)}
        | {"token_ids": (1, p.keep), "logits": (1, p.keep, 5)}
        for p in PLANS.profiles
    ]
    draft = [past | {"input_ids": (1, 2), "position_ids": (1, 2), "token_ids": (1, 4)} for c in (8, 16)]
    engines = {
        "model.engine": FakeEngine(fake, model, ["logits", "token_ids", "present.0.key"]),
        "draft.engine": FakeEngine(fake, draft, ["token_ids", "present.0.key"]),
    }
    api = SimpleNamespace(
        Runtime=lambda log: None,
        ILogger=object,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )
    fake_library = Library("tensorrt", "1.7.1.116", api)
    monkeypatch.setattr(executor, "load_library", lambda flavor, to_run: fake_library)
    monkeypatch.setattr(executor, "open_engine", lambda _library, _runtime, _log, plan, _weights: engines[plan.name])
    return SimpleNamespace(cuda=fake, engines=engines)


MANIFEST = SimpleNamespace(tensorrt=PLANS, slots=0, head_rows_quantization="none")


@pytest.fixture
def opened(gpu, tmp_path):
    bundle = Bundle(tmp_path, MANIFEST, None)
    with_it = executor.TensorRTExecutor(bundle)
    yield with_it
    with_it.close()
    with_it.close()
    assert not gpu.cuda.memory, "memory is left"
    assert not gpu.cuda.live, "streams or graphs are left"


def step(with_it, profile, ids, start, rows) -> StepOutput:
    positions = np.arange(start, start + len(ids))
    return with_it.step(PLANS.profiles[profile], np.array(ids), positions, np.array(rows))


def test_steps_read_the_cache_that_steps_before_wrote(opened):
    assert step(opened, 1, [5, 6, 7], 0, [0, 1, 2]).token_ids.tolist() == [5, 11, 18]
    output = step(opened, 0, [1, 2], 3, [0])
    assert output.token_ids.tolist() == [19]
    assert output.logits.tolist() == [[19, 20, 21, 22, 23]]
    assert step(opened, 0, [9, 9], 1, [1]).token_ids.tolist() == [23]  # over what a rewind forgot


def test_a_profile_runs_as_a_cuda_graph_from_its_second_call_on(opened, gpu):
    for call in range(4):
        assert step(opened, 0, [call, 2], 0, [1]).token_ids.tolist() == [call + 2]
        assert (gpu.cuda.launches, opened.cuda_graphs) == (call, min(call, 1))
    assert gpu.cuda.graphs == 1


@pytest.mark.parametrize("way", ["the library says so", "the attempt fails"])
def test_what_cannot_be_captured_is_launched_plainly(opened, gpu, way):
    if way == "the library says so":
        gpu.engines["model.engine"].capturable = False
    else:
        gpu.engines["model.engine"].fails_while_capturing = True
    for call in range(3):
        assert step(opened, 0, [call, 2], 0, [1]).token_ids.tolist() == [call + 2]
    assert (gpu.cuda.launches, opened.cuda_graphs) == (0, 0)


def test_a_draft_shares_the_cache(opened):
    step(opened, 1, [5, 6, 7], 0, [0, 1, 2])
    for _ in range(3):
        assert opened.draft(8, np.array([1, 2]), np.array([3, 4])).tolist() == [21, 22, 23, 24]


def test_spans_are_profiles_over_one_cache(opened):
    step(opened, 1, [5, 6, 7], 0, [0, 1, 2])
    assert step(opened, 0, [1, 2], 3, [1]).token_ids.tolist() == [21]
    assert step(opened, 2, [3, 4], 5, [1]).token_ids.tolist() == [28]
    assert opened.draft(16, np.array([1, 1]), np.array([4, 5])).tolist()[0] == 21


@pytest.mark.parametrize("allocation", range(2))
def test_an_executor_that_cannot_be_made_leaves_nothing(gpu, tmp_path, allocation):
    gpu.cuda.fail_malloc_at = allocation
    with pytest.raises(VocabtrimError, match="out of GPU memory"):
        executor.TensorRTExecutor(Bundle(tmp_path, MANIFEST, None))
    assert not gpu.cuda.memory
    assert not gpu.cuda.live


@pytest.mark.parametrize("allocation", range(5))
def test_a_profile_that_cannot_be_bound_leaves_nothing(opened, gpu, allocation):
    before = set(gpu.cuda.memory)
    gpu.cuda.fail_malloc_at = allocation
    with pytest.raises(VocabtrimError, match="out of GPU memory"):
        step(opened, 0, [1, 2], 0, [1])
    assert set(gpu.cuda.memory) == before
    gpu.cuda.fail_malloc_at = None
    assert step(opened, 0, [1, 2], 0, [1]).token_ids.tolist() == [3]


def test_a_failed_run_carries_the_librarys_reason(opened, gpu):
    gpu.engines["model.engine"].fails = True
    with pytest.raises(RuntimeError, match="TensorRT failed to run a plan: it gave no reason"):
        step(opened, 0, [1, 2], 0, [1])


@pytest.fixture
def slotted(gpu, tmp_path):
    """The bundle of three rows and two slots; token t, which is not kept, has a row of three times t."""
    for name, engine in gpu.engines.items():
        profiles = [profile | {"slot_weight": (3, 2), "slot_token_ids": (2,)} for profile in engine.profiles]
        gpu.engines[name] = FakeEngine(gpu.cuda, profiles, engine.outputs, slots=True)
    vocab_map = VocabMap.from_ids([0, 10, 20], 30)
    lost = np.setdiff1d(np.arange(30), vocab_map.kept_token_ids)
    weight = np.repeat(lost[:, None], 3, 1).astype(np.float16)
    save_file({"token_ids": lost, "weight": weight}, tmp_path / "head_rows.safetensors")
    return Bundle(tmp_path, SimpleNamespace(tensorrt=PLANS, slots=2, head_rows_quantization="none"), vocab_map)


def test_slots_are_bound_once_and_a_token_is_one_copy(slotted, gpu):
    with_it = executor.TensorRTExecutor(slotted)

    def slot_sum():
        return step(with_it, 0, [0, 0], 0, [1]).token_ids.item() // 3

    seen = []
    for tokens in ([], [4], [4], [5, 4], [6], []):  # captured by the second step, replayed from the third on
        gpu.cuda.columns.clear()
        with_it.slots.see(tokens)
        seen.append((slot_sum(), tuple(gpu.cuda.columns)))
    assert seen == [(0, ()), (4, (2,)), (4, ()), (9, (2,)), (10, (2,)), (10, ())]
    assert with_it.cuda_graphs == 1
    assert with_it.draft(8, np.array([0, 0]), np.array([0, 1])).tolist()[0] == 30
    with_it.slots.clear()
    assert slot_sum() == 0
    gpu.cuda.columns.clear()
    with_it.slots.see([7, 8])
    assert gpu.cuda.columns == [4]  # neighbours
    assert slot_sum() == 15
    with_it.close()
    assert not gpu.cuda.memory
    assert not gpu.cuda.live


def test_slots_that_are_not_the_plans_are_refused(slotted, gpu):
    slotted.manifest.slots = 3
    with pytest.raises(VocabtrimError, match=r"slots of the graph in .* are not those that head_rows"):
        executor.TensorRTExecutor(slotted)
    slotted.manifest.slots = 2
    for allocation in range(4):
        gpu.cuda.fail_malloc_at = allocation
        with pytest.raises(VocabtrimError, match="out of GPU memory"):
            executor.TensorRTExecutor(slotted)
        assert not gpu.cuda.memory
        assert not gpu.cuda.live


def test_a_bundle_without_plans_is_refused(tmp_path):
    for plans in (None, replace(PLANS, flavor="none")):
        with pytest.raises(VocabtrimError, match="holds no TensorRT plans: export it with --format trt"):
            executor.TensorRTExecutor(Bundle(tmp_path, SimpleNamespace(tensorrt=plans), None))
