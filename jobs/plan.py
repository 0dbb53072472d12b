"""`dpal plan`: how large, how long, how dear, and what would be the bottleneck."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpal.base.config import load_recipe
from dpal.base.errors import ConfigError, StorageError
from jobs.planning.advice import advice, words_for
from jobs.planning.model import reckon
from jobs.planning.rates import Rates, read_rates, split_words
from jobs.planning.table import plan_text
from jobs.planning.types import Plan, Workload
from jobs.planning.workload import Size, workload

MOST = 10**12  # images, students, devices or epochs


@dataclass(frozen=True)
class Planned:
    """A plan with what it was reckoned from; `words` make the recipe use the planned devices."""

    name: str
    work: Workload
    rates: Rates
    plan: Plan
    warnings: tuple[str, ...]
    words: tuple[str, ...]

    def text(self) -> str:
        """The table."""
        return plan_text(self.name, self.work, self.rates, self.plan, self.warnings, self.words)

    def to_json(self) -> str:
        """Everything, for machines; what is infinite is null."""
        record = {
            "recipe": self.name,
            "workload": {
                **asdict(self.work),
                "shards": self.work.shards,
                "shard_bytes": self.work.shard_bytes,
                "target_bytes": self.work.target_bytes,
                "target_objects": self.work.target_objects,
            },
            "rates": self.rates.model_dump(mode="json"),
            "plan": {**asdict(self.plan), "cheaper": self.plan.cheaper},
            "warnings": list(self.warnings),
            "words": list(self.words),
        }
        return json.dumps(_finite(record), indent=1, allow_nan=False) + "\n"


def plan(recipe_path: str, words: tuple[str, ...], rates_path: str, size: Size) -> Planned:
    """The plan of a recipe; `words` override the recipe, or the rates as `rates.<key>=<value>`.

    Raises:
        ConfigError: naming recipe, rates file or option, and what is accepted.
    """
    _check(size)
    recipe_words, rate_words = split_words(words)
    recipe = load_recipe(recipe_path, recipe_words)
    rates = read_rates(Path(rates_path), rate_words)
    work = workload(recipe, rates, size)
    found = reckon(work, rates)
    warnings, using = advice(recipe, work, rates, found), words_for(recipe, work, rates)
    return Planned(recipe.name, work, rates, found, warnings, using)


def write_json(path: Path, planned: Planned) -> None:
    """Write the plan as JSON. Raises StorageError."""
    try:
        path.write_text(planned.to_json())
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def _check(size: Size) -> None:
    for name in ("images", "students", "devices", "epochs"):
        value = getattr(size, name)
        if value is not None and not 0 < value <= MOST:  # nor is NaN
            raise ConfigError(f"--{name} {value:g}: accepted are numbers above 0, up to {MOST:g}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
