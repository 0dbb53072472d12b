"""The `student` section of a recipe: the backbone that is kept."""

from typing import Literal

from pydantic import Field

from dpal.base.section import Section

PATCH = 16


class Student(Section):
    """The backbone that is kept."""

    name: Literal["vit_tiny", "vit_small", "vit_base"] = Field("vit_tiny", description="backbone")
    height: int = Field(256, description="input height: views.height or an even fraction of it")
    width: int = Field(128, description="input width: half of the height")
    heads: Literal["paper", "timm"] = Field(
        "paper", description="'paper': 6 heads (Ti, S), last block last_heads; 'timm': stock heads"
    )
    last_heads: int = Field(
        12, ge=1, description="heads of the last block: the teacher's (base 12, large 16)"
    )
    positions: Literal["1d", "2d"] = Field(
        "1d", description="how the position embedding is resized for crops and composites"
    )
