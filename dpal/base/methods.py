"""The `method` section of a recipe: what turns teachers and views into losses.

`method: proteus` is short for `method: {kind: proteus}`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dpal.base.saip import Saip
from dpal.base.section import Section


class Dpal(Section):
    """DPAL: three alignment levels through D-PaDe; see the sections `decoder` and `loss`."""

    kind: Literal["dpal"] = "dpal"


class Mse(Section):
    """Plain feature distillation: mean squared error of projected CLS and patch tokens."""

    kind: Literal["mse"] = "mse"
    identity: float = Field(1.0, ge=0, description="weight of the CLS term")
    shape: float = Field(1.0, ge=0, description="weight of the patch term")


class Proteus(Section):
    """Proteus: token, feature and masked-patch terms, each through a head of its own."""

    kind: Literal["proteus"] = "proteus"
    token: float = Field(1.0, ge=0, description="weight of the CLS term")
    feature: float = Field(1.0, ge=0, description="weight of the term over all tokens")
    patch: float = Field(1.0, ge=0, description="weight of the masked-patch term")
    mask_probability: float = Field(0.5, gt=0, le=1, description="share of images that are masked")
    mask_ratio: float = Field(0.5, gt=0, lt=1, description="share of a masked image's patches")


class TinyMim(Section):
    """TinyMIM: query-key and value-value relations of one block of a ViT teacher."""

    kind: Literal["tinymim"] = "tinymim"
    qk: float = Field(1.0, ge=0, description="weight of the query-key relation")
    vv: float = Field(1.0, ge=0, description="weight of the value-value relation")


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Method = Annotated[
    Annotated[Dpal | Mse | Proteus | TinyMim | Saip, Field(discriminator="kind")],
    BeforeValidator(_named),
]
