"""The `method` section of a recipe when it is SAIP: self-supervised, without a teacher."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dpal.base.section import Section

if TYPE_CHECKING:
    from dpal.base.recipe import Recipe

SEARCH_HEADS = 4  # attention heads of the search decoder (CSS)


class Saip(Section):
    """SAIP: matching, reconstruction and search across scales against an averaged student."""

    kind: Literal["saip"] = "saip"
    local_crops: int = Field(
        7, ge=1, description="local crops; the region image joins them as one more small image"
    )
    prototypes: int = Field(65536, ge=2, description="prototypes K of the matching term")
    hidden: int = Field(2048, ge=1, description="hidden width of the matching head")
    bottleneck: int = Field(256, ge=1, description="width of the matching head's unit vectors")
    decoder_width: int = Field(512, ge=16, description="width of both decoders (CSR, CSS)")
    decoder_depth: int = Field(8, ge=1, description="blocks of the reconstruction decoder (CSR)")
    decoder_heads: int = Field(16, ge=1, description="heads of the reconstruction decoder (CSR)")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of patches hidden from CSR")
    ema: float = Field(0.996, ge=0, lt=1, description="momentum of the averaged student at first")
    ema_schedule: Literal["run", "epoch"] = Field(
        "run",
        description="'run': the momentum rises to 1 over the whole run (as intended); 'epoch': its "
        "step is counted from the start of each epoch (what the reference does)",
    )
    representation: float = Field(1.0, ge=0, description="weight of prototype matching (CSM)")
    attention: float = Field(1.0, ge=0, description="weight of the attention relations (CSM)")
    reconstruction: float = Field(1.0, ge=0, description="weight of masked pixels (CSR)")
    instance: float = Field(1.0, ge=0, description="weight of finding the whole person (CSS)")
    region: float = Field(1.0, ge=0, description="weight of finding the local crop (CSS)")

    @model_validator(mode="after")
    def _heads_divide(self) -> "Saip":
        for name, heads in (("decoder_heads", self.decoder_heads), ("", SEARCH_HEADS)):
            if self.decoder_width % heads:
                reason = f"method.{name}={heads}" if name else f"the {heads} heads of the search"
                raise ValueError(
                    f"method.decoder_width={self.decoder_width}: accepted are multiples of {reason}"
                )
        return self


def misfit(recipe: "Recipe") -> str:
    """What of a recipe SAIP cannot work with, in one sentence; empty when all fits."""
    student, views = recipe.student, recipe.views
    if student.family != "vit":
        return (
            f"student.name={student.name}: method.kind=saip reads the middle and the last "
            "attention of a ViT; accepted are vit_tiny, vit_small and vit_base"
        )
    if student.drop_path:
        return f"student.drop_path={student.drop_path}: accepted with method.kind=saip is 0"
    if views.height != student.height:
        return (
            f"views.height={views.height} with method.kind=saip: no teacher looks at larger "
            f"views, so accepted is student.height={student.height}"
        )
    if recipe.train.zero_stage == 3:
        return (
            "train.zero_stage=3 with method.kind=saip: the moving average needs whole parameters "
            "on every process; accepted are 0, 1 and 2"
        )
    return ""
