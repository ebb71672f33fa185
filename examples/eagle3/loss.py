"""The training-time test of EAGLE-3: unrolled draft steps, each judged by the target's distribution."""

from dataclasses import dataclass

import torch
from model import Eagle3Head, Past
from target import Target
from torch import Tensor
from torch.nn import functional as F

CHUNK = 8192  # rows of logits held at once


@dataclass(frozen=True, slots=True)
class Labels:
    """The target's predictions at every position. expected: float32 [rows, length, hidden], unembedding rows averaged
    by the probabilities p. best: int64 [rows, length]. valid: bool [rows, length], the next token is in an answer;
    the other two are 0 elsewhere."""

    expected: Tensor
    best: Tensor
    valid: Tensor


@torch.no_grad()
def make_labels(final: Tensor, mask: Tensor, unembedding: Tensor) -> Labels:
    """final: [rows, length, hidden], the target's last hidden states. unembedding: [vocabulary or fewer, hidden]."""
    valid = F.pad(mask[:, 1:], (0, 1))
    expected = torch.zeros(*final.shape, dtype=torch.float32, device=final.device)
    best = torch.zeros_like(valid, dtype=torch.int64)
    parts = []
    for chunk in final[valid].split(CHUNK):
        logits = chunk @ unembedding.T
        parts.append(((logits.softmax(-1) @ unembedding).float(), logits.argmax(-1)))
    expected[valid] = torch.cat([part[0] for part in parts])
    best[valid] = torch.cat([part[1] for part in parts])
    return Labels(expected, best, valid)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the draft's logits z = h·Uᵀ against p: -Σ p·log softmax(z) = logsumexp(z) - h·(p·U).

    p·U is made once a position, not once a draft step, and the gradient needs no logits kept: softmax(z)·U - p·U.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, expected: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        """hidden, expected: [rows, hidden]. → the loss, a float32 scalar; each row's likeliest token, int64."""
        hidden = hidden.float()
        gradient, best = torch.empty_like(hidden), torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        total = hidden.new_zeros(())
        with torch.autocast(hidden.device.type, enabled=False):  # it would write every softmax in float32
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                logits = hidden[part].to(unembedding.dtype) @ unembedding.T
                shares = logits.softmax(-1)
                best[part] = logits.argmax(-1)
                at = best[part, None]
                # logsumexp by way of the likeliest token: it needs no float32 copy of the logits
                total += (logits.gather(1, at).float() - shares.gather(1, at).float().log()).sum()
                gradient[part] = (shares @ unembedding).float() - expected[part]
            total -= (hidden * expected).sum()
        ctx.save_for_backward(gradient / len(hidden))
        ctx.mark_non_differentiable(best)
        return total / len(hidden), best

    @staticmethod
    def backward(ctx, loss: Tensor, _best: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return ctx.saved_tensors[0] * loss, None, None


def unroll(
    head: Eagle3Head, target: Target, features: Tensor, ids: Tensor, labels: Labels, unembedding: Tensor, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses (float32 scalars) and top-1 agreements of draft steps 0…steps-1 from every position at once.

    features: [rows, length, 3·hidden]. ids: int64 [rows, length]. Step k at row t reads the true token t + 1 + k and is
    judged by the target at position t + 1 + k.
    """
    hidden, past = head.fc(features), Past()
    losses, agreements = [], []
    for ahead in range(1, steps + 1):
        tokens = F.pad(ids[:, ahead:], (0, ahead))  # rows beyond the end are judged by nobody
        hidden = head.step(hidden, F.embedding(tokens, target.embedding), past)
        judged = F.pad(labels.valid[:, ahead:], (0, ahead))
        expected, wanted = labels.expected[:, ahead:], labels.best[:, ahead:]
        here = labels.valid[:, ahead:]
        loss, best = CrossEntropy.apply(head.norm(hidden[judged]), expected[here], unembedding)
        losses.append(loss)
        agreements.append((best == wanted[here]).float().mean())
    return losses, agreements


def weighted(losses: list[Tensor], decay: float = 0.8) -> Tensor:
    """Later steps count less: they are reached less often."""
    weights = [decay**step for step in range(len(losses))]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
