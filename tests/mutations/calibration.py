"""Promises of calibration: what is counted, once each, whatever the data and whoever counts."""

from tests.mutations.mutation import Mutation

FORMS = "tests/vocabtrim_export/test_input_forms.py"
RAY = "tests/vocabtrim_export/test_ray.py"
ENDPOINT = "tests/integration/test_calibration_endpoint.py"
HUB = "tests/vocabtrim_export/test_hub_data.py"

CALIBRATION = (
    Mutation(
        "A batch whose Ray worker dies is counted once",
        "its documents count as empty",
        "vocabtrim_export/calibration/ray_workers.py",
        "self.workers.replace(self.actor)\n                self._begin()",
        'return BatchTokens([__import__("numpy").zeros(0, int) for _ in self.batch.documents])',
        f"{RAY} -k killed",
    ),
    Mutation(
        "A batch whose Ray worker dies goes on where it was saved",
        "it starts over",
        "vocabtrim_export/calibration/ray_workers.py",
        "tuple(self.unfinished.stored())",
        "()",
        f"{RAY} -k killed",
    ),
    Mutation(
        "A stopped or killed Ray driver goes on where its workers' batches were saved",
        "what workers set aside is dropped",
        "vocabtrim_export/calibration/ray_workers.py",
        "self._append(ray.get(reference))",
        "ray.get(reference)",
        f"{RAY} -k driver",
    ),
    Mutation(
        "All of a text is counted, up to a bound",
        "it stops where generations would be enough",
        "vocabtrim_export/calibration/counter.py",
        ' and job.source != "text"',
        "",
        "tests/vocabtrim_export/test_sufficiency.py -k all_of_a_text",
    ),
    Mutation(
        "A server's answer that is cut is asked for again",
        "what came is counted",
        "vocabtrim_export/calibration/endpoint.py",
        "_PASSING = (OSError, http.client.HTTPException, ValueError, RecursionError)",
        "_PASSING = (OSError,)",
        f"{ENDPOINT} -k cut",
    ),
    Mutation(
        "Options of calibration that would be ignored are refused",
        "those beside counts are taken",
        "vocabtrim_export/calibration/combinations.py",
        "if are_counts(settings.calibration):",
        "if False:",
        f"{ENDPOINT} -k would_be_ignored",
    ),
    Mutation(
        "Large files are counted as small ones are",
        "a text's last part is lost",
        "vocabtrim_export/calibration/document.py",
        "    if piece := rest.strip():\n",
        "    if False and (piece := rest.strip()):\n",
        f"{FORMS} -k plain_loop",
    ),
    Mutation(
        "Large files are counted as small ones are",
        "a record that is cut by a part's end is an error",
        "vocabtrim_export/calibration/text_files.py",
        "if not more or len(text) > MAX_LINE:",
        "if True:",
        f"{FORMS} -k plain_loop",
    ),
    Mutation(
        "A data set's columns are those that were asked for",
        "the first column that can be read is",
        "vocabtrim_export/calibration/hub_data.py",
        "for field, column in data.columns.items()} if data.columns else row",
        "for field, column in data.columns.items()} if False else row",
        f"{HUB} -k plain_loop",
    ),
    Mutation(
        "A hub that does not answer is an error within seconds",
        "the library asks it",
        "vocabtrim_export/calibration/hub_data.py",
        "_check_hub(data)",
        "pass",
        f"{HUB} -k within_seconds",
        within="_open",
    ),
    Mutation(
        "Documents in a file are the documents in memory",
        "lengths are those of the text",
        "vocabtrim_export/calibration/document_file.py",
        "lengths.append(document.prompt_length)",
        "lengths.append(len(document.text))",
        f"{FORMS} -k in_memory",
    ),
    Mutation(
        "Work ahead on a batch that does not follow is dropped",
        "it goes on",
        "vocabtrim_export/calibration/lookahead.py",
        "self._pending.pop(unwanted).cancel()",
        "pass",
        f"{FORMS} -k guessed",
    ),
    Mutation(
        "In a long text a token that was counted a few times comes after low ids",
        "the order is that of the counts",
        "vocabtrim_export/calibration/likely_order.py",
        "_SHARE = 0.1",
        "_SHARE = 0.0",
        "tests/vocabtrim_export/test_select.py",
    ),
)
