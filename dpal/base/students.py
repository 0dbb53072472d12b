"""The `student` section of a recipe: the backbone that is kept.

Three families stand behind one section: the ViTs of the method, Swin, and every convolutional or
hybrid network of timm whose last map has stride 16 or 32.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from dpal.base.section import Section

PATCH = 16
VIT_WIDTHS = {"vit_tiny": 192, "vit_small": 384, "vit_base": 768}
SWIN_DROP_PATH = 0.1
TITLES = {
    "vit_tiny": "ViT-Ti/16",
    "vit_small": "ViT-S/16",
    "vit_base": "ViT-B/16",
    "swin_tiny": "Swin-T",
    "swin_small": "Swin-S",
}
_VIT_ONLY = ("heads", "last_heads", "positions", "init", "position_embedding", "layer_scale")
# Plain transformers of timm: they have no pyramid of maps, and stand here under another name.
_NOT_BY_TIMM_NAME = ("vit_", "deit", "swin", "beit", "eva")


class Student(Section):
    """The backbone that is kept."""

    name: str = Field(
        "vit_tiny",
        pattern=r"^[a-z0-9_]+$",
        description="vit_tiny, vit_small, vit_base, swin_tiny, swin_small, or timm's name of a "
        "convolutional or hybrid network (mobilenetv4_conv_small, efficientvit_b1, ...)",
    )
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
    init: Literal["reference", "timm"] = Field(
        "reference",
        description="start values of a ViT: the reference's (Xavier, positions U[0, 1)) or timm's",
    )
    position_embedding: Literal["learned", "sincos"] = Field(
        "learned", description="positions of a ViT: trained, or fixed 2-D sines and cosines"
    )
    layer_scale: float = Field(
        0.0, ge=0, description="start value of a ViT's LayerScale; 0: the ViT has none"
    )
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="stochastic depth in training; ViT: all blocks but the last; Swin (default "
        "0.1) and timm names: rising linearly over the blocks",
    )

    @model_validator(mode="before")
    @classmethod
    def _swin_drops_paths(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("name", "")) in ("swin_tiny", "swin_small"):
            return {"drop_path": SWIN_DROP_PATH, **values}
        return values

    @model_validator(mode="after")
    def _keys_have_effect(self) -> "Student":
        if self.family == "timm" and self.name.startswith(_NOT_BY_TIMM_NAME):
            raise ValueError(
                f"student.name={self.name!r}: accepted are {', '.join(TITLES)}, and timm's names "
                "of convolutional and hybrid networks"
            )
        if self.family != "vit":
            for key in _VIT_ONLY:
                self._refuse(key, f"student.name={self.name}")
        elif self.heads == "timm":
            self._refuse("last_heads", "student.heads=timm")
        elif VIT_WIDTHS[self.name] % self.last_heads:
            raise ValueError(
                f"student.last_heads={self.last_heads}: accepted are divisors of the width "
                f"{VIT_WIDTHS[self.name]} of {self.name}"
            )
        return self

    @property
    def family(self) -> Literal["vit", "swin", "timm"]:
        """What kind of network it is; `timm` stands for every convolutional or hybrid one."""
        if self.name in VIT_WIDTHS:
            return "vit"
        return "swin" if self.name in TITLES else "timm"

    @property
    def title(self) -> str:
        """How the network is called in print."""
        return TITLES.get(self.name, self.name)

    def _refuse(self, key: str, because: str) -> None:
        value = getattr(self, key)
        if value != type(self).model_fields[key].default:
            raise ValueError(f"student.{key}={value} has no effect with {because}; leave it out")
