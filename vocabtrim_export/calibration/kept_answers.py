"""The answers of a server to an unfinished batch: those that came are kept on the disk, and are not asked for again."""

import json
from dataclasses import asdict

from vocabtrim_export.calibration.endpoint import Answer
from vocabtrim_export.calibration.partial_batch import Unfinished

_JSON = "json"  # the one tensor of a segment: uint8, the answers that came since the segment before


class KeptAnswers:
    """Answers by the index of their document in the batch.

    Args:
        unfinished: The storage of the answers, an earlier run's included; None keeps them in memory alone.
    """

    def __init__(self, unfinished: Unfinished | None) -> None:
        self._unfinished = unfinished
        self._unsaved: dict[int, Answer] = {}
        self.answers: dict[int, Answer] = {}
        for segment in unfinished.load() if unfinished is not None else ():
            kept = json.loads(segment[_JSON].numpy().tobytes())
            self.answers |= {int(index): Answer(**answer) for index, answer in kept.items()}

    @property
    def tokens(self) -> int:
        """The tokens of all answers, by the server's count."""
        return sum(answer.tokens or 0 for answer in self.answers.values())

    def add(self, index: int, answer: Answer) -> None:
        """Keep one more answer. It is written together with others, once that is due."""
        self.answers[index] = self._unsaved[index] = answer
        if self._unfinished is not None and self._unfinished.is_due:
            self.save()

    def save(self) -> None:
        """Write the answers that are not on the disk yet."""
        if self._unfinished is None or not self._unsaved:
            return
        import torch

        text = json.dumps({index: asdict(answer) for index, answer in self._unsaved.items()})
        self._unfinished.save({_JSON: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})
        self._unsaved = {}
