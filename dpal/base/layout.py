"""Where things lie in a run folder; every path of `runs/<name>/` is spelled here and only here."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe the run was started with."""
        return self.root / "recipe.yaml"

    @property
    def synthetic(self) -> Path:
        """Drawn persons: `persons/`, `backgrounds/`, `reid/`, `parsing/`, `teach/`."""
        return self.root / "synthetic"

    @property
    def teacher(self) -> Path:
        """Weights of the teacher that is taught on the spot."""
        return self.root / "teacher" / "teacher.safetensors"

    @property
    def events(self) -> Path:
        """One JSON object a line: training steps and checkpoints."""
        return self.root / "events.jsonl"

    @property
    def skipped(self) -> Path:
        """Damaged samples that training skipped, one JSON object a line."""
        return self.root / "skipped.jsonl"

    @property
    def shards(self) -> Path:
        """Shards that a run with `train.partial` learns from; written once, at its first start."""
        return self.root / "shards.json"

    @property
    def parity(self) -> Path:
        """The last comparison of cached targets with the teacher that passed before training."""
        return self.root / "parity.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-<number>/` checkpoints; valid where `COMMITTED` exists."""
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Scores of the student, its teacher, and the untrained student."""
        return self.root / "evaluation.json"

    @property
    def export(self) -> Path:
        """The exported student."""
        return self.root / "export"

    @property
    def previews(self) -> Path:
        """Pictures written by `dpal preview`."""
        return self.root / "previews"

    @property
    def diagnosis(self) -> Path:
        """Gradient cosines and routing, by `dpal diagnose`."""
        return self.root / "diagnosis.json"

    @property
    def grid_result(self) -> Path:
        """Scores of a run of a grid; written last."""
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.root / "report.html"
