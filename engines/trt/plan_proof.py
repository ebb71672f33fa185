"""A plan proves itself at its first load on a GPU: it computes what the graph that it was built from computes.

The export writes what the graph computes of a few tokens, `expected_logits.safetensors`. The first load feeds the plan
the same tokens in the same calls and writes the result to `plan_proof.json`, for this plan, library and GPU.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engines.base import Engine
from engines.bundle.manifest import DRAFT_PLAN_NAME, EXPECTED_NAME, PLAN_NAME
from engines.bundle.read import Bundle
from engines.bundle.typed_json import brief, decode, read
from engines.bundle.vocab_map import NOT_KEPT
from engines.deviation import deviation
from engines.errors import VocabtrimError

PROOF_NAME = "plan_proof.json"
# The largest difference of a logit that half precision explains, as a share of the logits' standard deviation. A plan
# that decodes wrongly is off by about 1.
TOLERANCE: Mapping[str, float] = {"fp16": 0.1, "bf16": 0.3}
_KEPT = 8  # the last positions of a call, whose logits are compared
_LOG = logging.getLogger("engines.trt")


@dataclass(frozen=True, slots=True)
class ExpectedLogits:
    """A graph's logits for a few tokens, which a plan must compute as well.

    Attributes:
        token_ids: int64[S], the tokens.
        lengths: int64[calls], how many of them each call feeds.
        columns: int64[C], the columns of the logits that are compared.
        logits: float32[rows, C], after the last positions of each call, `kept_positions` of them.
        slot_token_ids: int64[n], the tokens in the slots of the head; none in files of older versions.
    """

    token_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    columns: NDArray[np.int64]
    logits: NDArray[np.float32]
    slot_token_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def save(self, path: Path) -> None:
        path.write_bytes(save({name: getattr(self, name) for name in self.__slots__}))

    @classmethod
    def load(cls, path: Path) -> "ExpectedLogits":
        """Read the logits that `save` wrote.

        Raises:
            VocabtrimError: The file is missing or damaged.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError, TypeError) as error:
            raise VocabtrimError(f"{path} does not hold expected logits ({brief(error)}): export again") from error


@dataclass(frozen=True, slots=True)
class PlanProof:
    """A proof that was done.

    Attributes:
        plans: The digests of the plans' files, by their names.
        environment: The library, the driver and the GPU.
        largest_difference: The largest difference of a logit, as a share of the logits' standard deviation.
    """

    plans: Mapping[str, str]
    environment: Mapping[str, str]
    largest_difference: float


def kept_positions(length: int) -> int:
    """Returns how many of the last positions of a call of `length` tokens are compared."""
    return min(length, _KEPT)


def prove_plan(bundle: Bundle, engine: Engine) -> PlanProof | None:
    """Compare an engine that has just been loaded with what its graph computes, unless that was done before.

    The engine's KV cache is empty again afterwards.

    Args:
        bundle: The bundle with the plans.
        engine: The engine that runs them.

    Returns:
        The proof, which is also written to the bundle's directory if that is possible; None for a bundle that an older
        version exported, which states no expected logits.

    Raises:
        VocabtrimError: The plan computes something else.
    """
    digests = {name: bundle.manifest.files[name].sha256 for name in _plans(bundle)}
    if EXPECTED_NAME not in bundle.manifest.files:
        _LOG.warning("%s cannot be proven here, an older version exported it: export again", bundle.path)
        return None
    place, environment = bundle.path / PROOF_NAME, dict(engine.environment())
    done = _proof_at(place)
    if done and (done.plans, done.environment) == (digests, environment):
        return done
    largest = _largest_difference(engine, ExpectedLogits.load(bundle.path / EXPECTED_NAME))
    if not largest <= TOLERANCE.get(bundle.manifest.dtype, min(TOLERANCE.values())):
        raise VocabtrimError(
            f"{bundle.path}: on this GPU its plan does not compute what its graph does: a logit is off by "
            f"{largest:.2g} of the logits' spread. Build it with another version of TensorRT, or run a bundle of "
            "--format onnx"
        )
    proof = PlanProof(digests, environment, largest)
    try:
        place.write_text(json.dumps(asdict(proof), indent=2) + "\n", "utf-8")
    except OSError as error:
        _LOG.info("%s cannot be written (%s): the plan will be proven at each load", place, error.strerror)
    return proof


def _plans(bundle: Bundle) -> list[str]:
    return [name for name in (PLAN_NAME, DRAFT_PLAN_NAME) if name in bundle.manifest.files]


def _proof_at(place: Path) -> PlanProof | None:
    """Returns the proof in a file; None where there is no valid one."""
    try:
        proof: PlanProof = decode(PlanProof, read(place), str(place))
    except VocabtrimError:
        return None
    return proof


def _largest_difference(engine: Engine, expected: ExpectedLogits) -> float:
    """Returns the largest difference of a logit, as a share of the logits' standard deviation."""
    rows, begin = [], 0
    engine.remember(expected.slot_token_ids.tolist())
    for length in expected.lengths.tolist():
        output = engine.feed(expected.token_ids[begin : begin + length], kept_positions(length))
        rows.append(output.logits[:, expected.columns].copy())
        begin += length
    differences = [deviation(np.concatenate(rows), expected.logits), _draft_difference(engine, expected.token_ids)]
    engine.rewind(0)
    return float(np.max(differences))  # NaN where one is


def _draft_difference(engine: Engine, token_ids: NDArray[np.int64]) -> float:
    """Compare the tokens that one call drafts with single steps of the same plans.

    Returns:
        The largest gap between the best logit of a step and that of the token drafted there, as a share of the logits'
        standard deviation; 0 where the bundle has no plan that drafts in one call.
    """
    start = len(token_ids) - 1
    engine.rewind(start)
    drafted = engine.draft(token_ids[start:])
    if drafted is None:
        return 0.0
    engine.rewind(start)
    worst, token = 0.0, int(token_ids[start])
    for wanted in drafted.tolist():
        logits = engine.feed([token]).logits[0]
        column = wanted if engine.head_tokens is None else engine.head_tokens.inverse[wanted]
        finite = logits[np.isfinite(logits)]
        if column == NOT_KEPT or not np.isfinite(logits[column]):
            return float("inf")
        worst = max(worst, float((finite.max() - logits[column]) / finite.std()))
        token = wanted
    return worst
