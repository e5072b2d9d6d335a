"""The CLIP score (arXiv 2104.08718): how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.disk.files import few
from fxquant.errors import CheckpointError
from fxquant.evaluation.weights import CLIP, check_finite, require


class ClipScore:
    """The mean of ``max(100 cos(image, prompt), 0)``, as torchmetrics defines it.

    Args:
        folder: Folder of a CLIP model of transformers, with its tokenizer and image processor.
        device: Where it runs.

    Raises:
        MissingPackageError: If ``transformers`` is missing.
        CheckpointError: If the folder does not hold such a model.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        require("transformers")
        from transformers import CLIPModel, CLIPProcessor

        try:
            found: Any = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self._processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises nearly anything.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{folder} cannot be read as {CLIP.what}: {reason}; get {CLIP.where}") from error
        made, info = found
        missing = sorted({*info["missing_keys"], *(str(name) for name, *_ in info["mismatched_keys"])})
        if missing:  # transformers draws these at random.
            raise CheckpointError(f"{folder} does not hold {CLIP.what}: it lacks {few(missing)}; get {CLIP.where}")
        check_finite(folder, CLIP, made.state_dict())
        self._model: Any = made.to(device).eval()
        self._device = torch.device(device)
        self._sum, self.count = 0.0, 0

    @torch.no_grad()
    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add uint8 images ``[n, 3, H, W]`` with one prompt each; long prompts are cut to CLIP's length."""
        from PIL import Image

        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu()]
        given = self._processor(text=list(prompts), images=pictures, return_tensors="pt", padding=True, truncation=True)
        found = self._model(**given.to(self._device))
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        self._sum += (100 * cosines.double()).clamp(min=0).sum().item()
        self.count += len(pictures)

    def compute(self) -> float:
        """The score, 0 to 100."""
        return self._sum / self.count
