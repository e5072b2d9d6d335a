"""The inception score (arXiv 1606.03498), from sums that class scores are added to in the order of the images."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError

SPLITS = 10
"""Parts whose scores are averaged, as in the reference implementation: 5,000 images each of 50,000."""


class InceptionScore:
    """``exp(E_x KL(p(y|x) || p(y)))``, averaged over consecutive parts of the images.

    Args:
        images: Number of images that will be added.
        splits: Number of parts.

    Raises:
        ConfigurationError: If there are fewer images than parts.
    """

    def __init__(self, images: int, splits: int = SPLITS) -> None:
        if not 1 <= splits <= images:
            raise ConfigurationError(f"an inception score in {splits} parts needs at least {max(splits, 1)} images")
        self._ends = [(part + 1) * images // splits for part in range(splits)]
        self._added = 0
        self._entropies = [0.0] * splits
        self._sums: list[Tensor | None] = [None] * splits

    def add(self, logits: Tensor) -> None:
        """Add the class scores before the softmax, ``[n, classes]``, of the next images."""
        scores = logits.detach().to("cpu", torch.float64)
        while len(scores):
            part = next((i for i, end in enumerate(self._ends) if self._added < end), None)
            if part is None:
                raise ConfigurationError(f"more than {self._ends[-1]} images were added to an inception score")
            taken, scores = scores[: self._ends[part] - self._added], scores[self._ends[part] - self._added :]
            p, log_p = taken.softmax(dim=1), taken.log_softmax(dim=1)
            self._entropies[part] += float((p * log_p).sum())
            before = self._sums[part]
            self._sums[part] = p.sum(dim=0) if before is None else before + p.sum(dim=0)
            self._added += len(taken)

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts.

        Raises:
            ConfigurationError: If images are missing.
        """
        if self._added != self._ends[-1]:
            raise ConfigurationError(f"{self._added} of {self._ends[-1]} images were added to an inception score")
        found = []
        for start, end, entropy, total in zip([0, *self._ends], self._ends, self._entropies, self._sums, strict=False):
            assert total is not None
            marginal = total / (end - start)
            cross = torch.special.xlogy(total, marginal).sum().item()
            found.append((entropy - cross) / (end - start))
        scores = torch.tensor(found, dtype=torch.float64).exp()
        return scores.mean().item(), scores.std(correction=0).item()
