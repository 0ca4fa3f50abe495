"""The models that a run has validated: which is best, which are kept for a mean at the end, and where they stand.

Knows scores and directories; knows no step of training. What is decided goes into the run's Progress, which every
checkpoint holds.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import rmtree

from training.checkpoint import Progress
from training.config import RunSection, merit

VALIDATED = "validated"  # where a run keeps them


class Candidates:
    """Those of one run, under its directory. metric: which of the scores decides."""

    def __init__(self, directory: Path, run: RunSection, metric: str) -> None:
        self._directory, self._run, self._metric = directory / VALIDATED, run, metric

    def place(self, step: int) -> Path:
        """The directory of the model of a step."""
        return self._directory / f"step-{step:08d}"

    @property
    def mean(self) -> Path:
        """The directory of the mean of those that are kept for one."""
        return self._directory / "average"

    def best(self, progress: Progress) -> Path:
        assert progress.best_step is not None, "a run ends with a validation"
        return self.place(progress.best_step)

    def to_average(self, progress: Progress) -> list[Path]:
        """In the order of their steps."""
        return [self.place(step) for _, step in sorted(progress.kept, key=lambda kept: kept[1])]

    def is_better(self, progress: Progress, scores: Mapping[str, float]) -> bool:
        """Whether they are better than the best so far."""
        return progress.best_score is None or merit(self._metric, scores) > (progress.best_score, -progress.best_nll)

    def take(self, progress: Progress, scores: Mapping[str, float]) -> bool:
        """Note the model of this step, which has just been scored. Returns whether it is the best so far."""
        score, minus_nll = merit(self._metric, scores)
        better = self.is_better(progress, scores)
        if better:
            progress.best_score, progress.best_nll, progress.best_step = score, -minus_nll, progress.step
        if progress.step > 0:
            self._keep(progress, score)
        return better

    def clear(self, everyone: Iterable[Progress]) -> None:
        """Remove those that none of these names: a run may have to go on from any of its checkpoints."""
        needed = {path for progress in everyone for path in self.to_average(progress)}
        needed |= {self.best(progress) for progress in everyone if progress.best_step is not None}
        for candidate in self._directory.glob("step-*"):
            if candidate not in needed:
                rmtree(candidate)

    def _keep(self, progress: Progress, score: float) -> None:
        """Take the model up among those to average at the end, if it is one."""
        kept = progress.kept
        kept.append((score, progress.step))
        if self._run.average_best:
            kept.sort(reverse=True)
            del kept[self._run.average_best :]
        else:
            del kept[: max(0, len(kept) - (self._run.average_last or 0))]
