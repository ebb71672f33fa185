"""Promises about rounds on CUDA, seen on a simulated device."""

from tests.mutations.mutation import Mutation

CUDA, EAGLE, GRAPHS = (
    "tests/engines/test_onnxruntime_cuda.py",
    "tests/engines/test_onnxruntime_cuda_eagle.py",
    "tests/engines/test_sampling_graphs.py",
)
SAMPLER = "engines/ort_cuda/sampler.py"

DEVICE = (
    Mutation(
        "A sampled round on the device is the host's, number for number",
        "acceptance takes the uniforms that the drafts were drawn with",
        SAMPLER,
        "floats[last:][: steps + 1] = uniforms[steps:]",
        "floats[last:][: steps + 1] = uniforms[: steps + 1]",
        f"{CUDA} -k sampled_round",
    ),
    Mutation(
        "A sampled round on the device is the host's, number for number",
        "every draft step writes q over that of the first",
        SAMPLER,
        "self._q.data_ptr() + 4 * columns * step",
        "self._q.data_ptr()",
        f"{CUDA} -k sampled_round",
    ),
    Mutation(
        "A sampled round on the device is the host's, number for number",
        "the row that was drawn is taken for a token id",
        SAMPLER,
        "draw_graph(columns, kept, slots)",
        "draw_graph(columns, None)",
        f"{CUDA} -k sampled_round",
    ),
    Mutation(
        "A sampled round on the device is the host's, number for number",
        "what slots propose has no probability when it is judged",
        "engines/ort_cuda/graphs/acceptance.py",
        'graph.op("Where", is_slot, at, column)',
        "column",
        f"{CUDA} -k sampled_round",
    ),
    Mutation(
        "A sampled round on the device is the host's, number for number",
        "a rejected token's replacement is drawn as if slots proposed nothing",
        "engines/ort_cuda/graphs/acceptance.py",
        "self._with_slots(flat, kept)",
        "kept",
        f"{CUDA} -k sampled_round",
    ),
    Mutation(
        "Rounds on a device have the length that pays on this text",
        "how the last draft ended is forgotten",
        "runtime/draft_tiers.py",
        "self._outcome = _ALL if accepted == drafted else _SOME if accepted else _WRONG",
        "pass",
        "tests/runtime/test_draft_length.py -k tiers_follow",
    ),
    Mutation(
        "Slots on a device are those of the host, whatever was captured",
        "a token that enters is not copied",
        "engines/cuda/slots.py",
        "self._stream.copy_columns(target, source, pitch, size * len(columns), hidden)",
        "pass",
        f"{CUDA} -k slots",
    ),
    Mutation(
        "top-p keeps, of equal tokens, those with the smaller ids",
        "all of them stay",
        "engines/ort_cuda/graphs/sampling.py",
        'graph.op("And", ties, late)',
        'graph.op("And", ties, graph.op("Not", ties))',
        f"{GRAPHS} -k equal_weights",
    ),
    Mutation(
        "A head's round on the device is the stepwise one",
        "its cache is taken to be as long as its target's",
        "engines/ort_cuda/eagle.py",
        "lag = 1",
        "lag = 0",
        f"{EAGLE} -k stepwise",
    ),
    Mutation(
        "A head's round on the device is the stepwise one",
        "an EAGLE-1 head reads features one row late",
        "engines/ort_cuda/rows.py",
        "self.target.take(self.source, 0, self.count)",
        "self.target.take(self.source, 1, self.count)",
        f"{EAGLE} -k first_kind",
    ),
)
