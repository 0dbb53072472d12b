"""The `decoder` and `loss` sections of a recipe: the parts of DPAL."""

from typing import Literal

from pydantic import Field, model_validator

from dpal.base.section import Duration, Section


class Decoder(Section):
    """D-PaDe, the dynamic pattern decoder; discarded after pretraining."""

    kind: Literal["dynamic", "static", "linear", "shared"] = Field(
        "dynamic",
        description="'dynamic': D-PaDe; 'static': an MLP per pattern with as many parameters; "
        "'linear': a linear layer per pattern; 'shared': one linear layer",
    )
    patterns: Literal[2, 3] = Field(
        3, description="experts: identity, shape and relation, or the first two alone (Swin)"
    )
    query_init: Literal["zeros", "normal"] = Field(
        "zeros", description="pattern queries at start: zeros (reference) or N(0, .02)"
    )
    routing: Literal["soft", "top-1"] = Field(
        "soft", description="all experts mixed (reference), or the likeliest one alone"
    )

    @model_validator(mode="after")
    def _experts_exist(self) -> "Decoder":
        for key in ("query_init", "routing"):
            if self.kind != "dynamic" and getattr(self, key) != Decoder.model_fields[key].default:
                raise ValueError(
                    f"decoder.{key}={getattr(self, key)} has no effect with decoder.kind="
                    f"{self.kind}; accepted is to leave it out, or decoder.kind=dynamic"
                )
        return self


class Loss(Section):
    """Weights of the loss terms (defaults: the reference's final version)."""

    identity: float = Field(1.0, ge=0, description="weight of the global identity term")
    shape: float = Field(1.0, ge=0, description="weight of the local shape term")
    relation: float = Field(1.0, ge=0, description="weight of the multi-person relation term")
    router: float = Field(0.1, ge=0, description="weight of the router term at the start")
    router_late: float = Field(0.01, ge=0, description="weight of the router term afterwards")
    router_switch: Duration = Field("20 epochs", description="when router_late takes over")
    expert: float = Field(0.025, ge=0, description="weight of the expert penalty")
    targets: Literal["raw", "standardised", "phi-s"] = Field(
        "raw",
        description="'raw': tokens as the teacher says them (reference; of a final norm), "
        "'standardised' per channel with the cache's statistics (teachers of any other scale), or "
        "'phi-s': turned so that one scale serves every channel and errors keep their ratios",
    )
    affinity: Literal["log_softmax", "log"] = Field(
        "log_softmax",
        description="relation term by log-softmax, or log(softmax) as the reference writes it, "
        "which is infinite where an affinity underflows",
    )
    relation_level: Literal["tokens", "instances"] = Field(
        "tokens",
        description="what the relation term relates: all 'tokens' of a composite (reference), or "
        "the pooled 'instances' in the boxes of a real scene (views.composite=scenes)",
    )
    crop_patches: bool = Field(
        False,
        description="also compare the patch tokens of local crops, with what RoIAlign cuts for "
        "them out of the base view's target",
    )
    shape_mask: Literal["fixed", "per-batch", "none", "flipped"] = Field(
        "fixed",
        description="'fixed': basis of the cache header; 'per-batch': principal component of the "
        "batch's own tokens (reference); 'none': every patch counts 1; 'flipped': 1 - fixed",
    )
    teacher_drop: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="with several teachers: share of (image, teacher) losses left out; the "
        "largest of an image never is",
    )
