"""Progress of the passes of a conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import fx

    from fxquant.pipeline.pipeline import Pass, PassRecord
    from fxquant.pipeline.recipes import Recipe


class PassProgress:
    """Instrument that shows the passes as a progress bar."""

    def __init__(self, progress: Progress, recipe: Recipe) -> None:
        self.progress_bar = progress
        self.prepare, self.convert = len(recipe.prepare), len(recipe.convert)
        self.first = recipe.prepare[0] if recipe.prepare else None
        self.task: Any = None
        self.inner: Any = None
        self.seen = self.graphs = 0

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        """Show the name of the pass."""
        self.graphs += step == self.first
        total = max(self.graphs, 1) * (self.prepare + self.convert)
        if self.task is None:
            self.task = self.progress_bar.add_task("", total=total)
        self.progress_bar.update(self.task, total=total, description=f"pass: {step.name}")

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        """Advance by one; after the last pass the output error is measured."""
        self.seen += 1
        last = self.seen >= max(self.graphs, 1) * (self.prepare + self.convert)
        self.progress_bar.update(self.task, advance=1, description="measure the output" if last else None)

    def progress(self, step: Pass, what: str, done: int, total: int) -> None:
        """Show the progress of a slow pass."""
        if self.inner is None:
            self.inner = self.progress_bar.add_task("", total=total)
        self.progress_bar.update(self.inner, description=f"{step.name}: {what}", completed=done, total=total)

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        """Show which pass failed."""
        self.progress_bar.update(self.task, description=f"failed: {step.name}")

    def done(self) -> None:
        """Show that all passes are done."""
        if self.task is not None:
            self.progress_bar.update(self.task, description=f"passes: {self.seen} done")
