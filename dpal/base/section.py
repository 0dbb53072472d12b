"""What every section of a recipe is made of: strictness, and the types of its values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Pair = Annotated[tuple[int, int], Field(strict=False)]
Range = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Paths = Annotated[tuple[str, ...], Field(strict=False)]
Duration = Annotated[str, Field(pattern=r"^\d+(\.\d+)? (steps|epochs)$")]


class Section(BaseModel):
    """Base of all recipe sections: frozen, strict types, finite numbers, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
