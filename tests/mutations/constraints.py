"""Promises about generations under a constraint, such as a JSON schema."""

from tests.mutations.mutation import Mutation

LAW = "tests/runtime/test_constraint.py"
SCHEMA = "tests/runtime/test_json_schema.py"
MASKED = "Output under a constraint is the masked target's own"
FOLLOWED = "A JSON schema allows what can go on to its JSON, and an end where it may end"
REFUSED = "A hostile JSON schema costs a moment and reads nothing"

CONSTRAINTS = (
    Mutation(
        MASKED,
        "a verified position has the mask of the draft's beginning",
        "runtime/constraint.py",
        "return self._masks[len(draft)]",
        "return self._masks[0]",
        f"{LAW} -k law",
    ),
    Mutation(
        MASKED,
        "the target is not masked",
        "runtime/rules.py",
        "self.warped(require_choice(self.rules.apply(logits[i], draft[:i], self.columns)))",
        "self.warped(logits[i])",
        f"{LAW} -k law",
    ),
    Mutation(
        MASKED,
        "rejected tokens stay in the constraint's state",
        "runtime/constraint.py",
        "self._constraint.rewind(len(self._draft) - same)",
        "pass",
        f"{LAW} -k own",
    ),
    Mutation(
        MASKED,
        "the mask comes after top-k and top-p",
        "runtime/rules.py",
        "self.warped(require_choice(self.rules.apply(logits[i], draft[:i], self.columns)))",
        "self.warped(logits[i]) * (self.rules.apply(logits[i], draft[:i], self.columns) != FORBIDDEN)",
        f"{LAW} -k law",
    ),
    Mutation(
        MASKED,
        "what is not allowed is unlikely",
        "runtime/constraint.py",
        "np.where(columns.spread(self._masks.after(draft)), row, FORBIDDEN)",
        "np.where(columns.spread(self._masks.after(draft)), row, row - 3)",
        f"{LAW} -k law",
    ),
    Mutation(
        MASKED,
        "a drafter's rows are taken for token ids",
        "runtime/logit_rules.py",
        "by_token[tokens] & (tokens != NOT_KEPT)",
        "by_token[: len(tokens)] & (tokens != NOT_KEPT)",
        f"{LAW} -k drafts_nothing",
    ),
    Mutation(
        MASKED,
        "a device drafts without the mask",
        "runtime/rules.py",
        "self.rules, self.runs_on_device = rules, rules is None",
        "self.rules, self.runs_on_device = rules, True",
        f"{LAW} -k by_itself",
    ),
    Mutation(
        MASKED,
        "log-probabilities are those of the bare logits",
        "runtime/loop.py",
        "self.masks.of_last_tokens(output.logits) if self.masks else output.logits",
        "output.logits",
        f"{LAW} -k own",
    ),
    Mutation(
        FOLLOWED,
        "bits are read in the other order",
        "runtime/json_schema.py",
        'bitorder="little"',
        'bitorder="big"',
        f"{SCHEMA} -k mask",
    ),
    Mutation(
        FOLLOWED,
        "white space may go on for ever",
        "runtime/json_schema.py",
        ', overrides={"whitespace_pattern": _WHITE_SPACE}',
        "",
        f"{SCHEMA} -k mask",
    ),
    Mutation(
        FOLLOWED,
        "a token behind the end is taken back from the JSON",
        "runtime/json_schema.py",
        "behind = min(count, self._behind)",
        "behind = 0",
        f"{SCHEMA} -k rewinding",
    ),
    Mutation(
        REFUSED,
        "automata have as many states as they are asked for",
        "runtime/json_schema.py",
        "if lcm(*(int(each * whole) for each in multiples)) > _MOST_MULTIPLE:",
        "if False:",
        f"{SCHEMA} -k parts",
    ),
    Mutation(
        REFUSED,
        "a schema may have any size",
        "runtime/json_schema.py",
        "if len(text) > MOST_BYTES:",
        "if False:",
        f"{SCHEMA} -k enum",
    ),
    Mutation(
        "A server's text is that of generate",
        "a schema is checked and not applied",
        "vocabtrim_export/serve/running.py",
        "json_schema=job.json_schema",
        "json_schema=None",
        "tests/integration/test_response_format.py -k answer",
    ),
)
