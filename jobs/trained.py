"""The student of a run's last committed checkpoint, for those who only read it."""

from safetensors import SafetensorError

from dpal import checkpoint
from dpal.base.errors import DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.checkpoint import Checkpoint
from dpal.model.student import Student, build_student


def last_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """The last committed checkpoint of the run; None without one."""
    return checkpoint.latest(RunLayout(recipe.run_dir).checkpoints)


def load_student(recipe: Recipe, found: Checkpoint) -> Student:
    """The student of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        DataError: when the weights are damaged or do not fit the recipe.
    """
    student = build_student(recipe.student)
    try:
        student.load_state_dict(checkpoint.student_state(found), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(f"{found.folder} does not hold this recipe's student ({reason})") from None
    return student.eval().requires_grad_(False)
