"""The `storage`, `data` and `views` sections of a recipe: where images are, and what is seen."""

from typing import Literal

from pydantic import Field, SecretStr, model_validator

from dpal.base.section import Paths, Range, Section
from dpal.base.students import PATCH

_LISTS = (".csv", ".parquet", ".json", ".odgt")


class Storage(Section):
    """How object storage is reached; empty values fall back to the standard AWS variables."""

    endpoint_url: str = Field("", description="S3 endpoint, for stores other than AWS")
    key: SecretStr = Field(SecretStr(""), strict=False, description="access key; never printed")
    secret: SecretStr = Field(SecretStr(""), strict=False, description="secret; never printed")
    retries: int = Field(5, ge=0, description="attempts after the first for a failed request")
    timeout_s: float = Field(
        30.0, gt=0, description="seconds a request may go without a byte, or take to connect"
    )
    min_mb_per_s: float = Field(
        0.1,
        gt=0,
        description="a transfer that is slower, in MB/s, is given up and tried again, "
        "storage.timeout_s later",
    )
    copies: str = Field(
        "{run}/shard-copies",
        description="local folder for copies of remote shards and targets; runs of one node share "
        "copies if they name the same folder, best on the node's own disk",
    )
    copies_gb: float = Field(
        50.0,
        ge=0,
        description="size of all copies together, in GB; the least recently used go first; 0 keeps "
        "what is being read in memory alone",
    )


class Synthetic(Section):
    """Size of the embedded synthetic data set."""

    identities: int = Field(240, ge=4, description="identities drawn for pretraining")
    images_per_identity: int = Field(8, ge=2, description="images drawn for each identity")
    held_out_identities: int = Field(40, ge=4, description="identities drawn for evaluation only")


class Data(Section):
    """Where the images are and how they are sharded."""

    images: Paths = Field(
        min_length=1,
        description="folders or URLs of person images, tables (.csv, .parquet), COCO .json, "
        "CrowdHuman .odgt, tars or LMDB; the single word 'synthetic' draws them",
    )
    names: Literal["plain", "market1501"] = Field(
        "plain",
        description="what picture names in folders tell: 'market1501': identity and camera, as in "
        "0002_c1s1_000451_03.jpg; junk and distractors are left out",
    )
    pictures: str = Field(
        "",
        description="folder or URL of the pictures that tables and annotations name; empty: the "
        "folder of the table or annotations",
    )
    persons: Literal["crops", "scenes"] = Field(
        "crops",
        description="what annotated pictures give: 'crops': an image of each person; 'scenes': the "
        "whole picture with all boxes",
    )
    margin: float = Field(
        0.1, ge=0, le=1, description="added around a person's box, share of its size on every side"
    )
    backgrounds: Paths = Field(
        (),
        description="folders of images used behind composites; empty: person images serve",
    )
    scenes: Paths = Field(
        (),
        description="folders of images of several persons, for views.composite=scenes; boxes are "
        "read from boxes.csv (file,left,top,right,bottom) or from a COCO instances .json in them",
    )
    shards: str = Field("{run}/shards", description="folder or URL the shards are written to")
    samples_per_shard: int = Field(512, ge=1, le=131_072, description="images in one shard")
    max_shards: int = Field(
        0, ge=0, description="learn from the first so many shards alone, for trials; 0: from all"
    )
    min_side: int = Field(32, ge=1, description="smaller images are rejected, in pixels")
    max_pixels: int = Field(64_000_000, ge=1, description="larger images are rejected undecoded")
    max_reject_fraction: float = Field(
        0.2, ge=0, le=1, description="share of images that may be rejected before sharding stops"
    )
    max_skip_fraction: float = Field(
        0.0001,
        ge=0,
        le=1,
        description="share of damaged samples that training may skip; each is listed in the run's "
        "skipped.jsonl, and one more stops the run",
    )
    max_side: int = Field(
        0, ge=0, description="larger pictures are scaled down to it when encoded anew; 0: never"
    )
    encode: Literal["keep", "jpeg"] = Field(
        "keep",
        description="'keep': whole pictures keep their very bytes, persons cut out of one become "
        "JPEG of quality 95; 'jpeg': everything is encoded anew, upright, 4:2:0",
    )
    jpeg_quality: int = Field(90, ge=1, le=100, description="quality for data.encode=jpeg")
    near_duplicates: int = Field(
        0,
        ge=0,
        le=6,
        description="images whose 64-bit perceptual hashes differ in so many bits or fewer are one "
        "image, and the largest is kept; 2 to 4 finds copies, from 6 on persons before the same "
        "wall are taken for one; 0: only equal bytes are one image",
    )
    validation_fraction: float = Field(
        0,
        ge=0,
        lt=1,
        description="share of identities (of images, where none is known) kept apart from "
        "pretraining, in <shards>/validation",
    )
    max_backgrounds: int = Field(256, ge=1, description="backgrounds kept in memory")
    max_scenes: int = Field(
        20_000, ge=1, le=65_536, description="scenes that composites are drawn from"
    )
    synthetic: Synthetic = Synthetic()

    @model_validator(mode="after")
    def _encoding_has_effect(self) -> "Data":
        default = Data.model_fields
        for name in ("max_side", "jpeg_quality"):
            if self.encode == "keep" and getattr(self, name) != default[name].default:
                raise ValueError(
                    f"data.{name} has no effect with data.encode=keep; accepted is data.encode=jpeg"
                )
        if 0 < self.max_side < self.min_side:
            raise ValueError(
                f"data.max_side={self.max_side} is below data.min_side={self.min_side}: "
                "accepted is 0, or data.min_side and more"
            )
        return self

    @model_validator(mode="after")
    def _synthetic_has_effect(self) -> "Data":
        if self.synthetic != Synthetic() and self.images != ("synthetic",):
            raise ValueError("data.synthetic has no effect unless data.images is ['synthetic']")
        return self

    @model_validator(mode="after")
    def _persons_have_effect(self) -> "Data":
        sources = (*self.images, *self.backgrounds, *self.scenes)
        lists = [source.lower().endswith(_LISTS) for source in sources]
        defaults = type(self).model_fields
        for key in ("pictures", "persons", "margin"):
            if getattr(self, key) != defaults[key].default and not any(lists):
                raise ValueError(
                    f"data.{key}={getattr(self, key)!r} has no effect unless data.images names a "
                    f"table or annotations ({', '.join(_LISTS)})"
                )
        if self.persons == "scenes" and self.margin != defaults["margin"].default:
            raise ValueError("data.margin has no effect with data.persons=scenes: nothing is cut")
        nameless = all(source.lower().endswith((*_LISTS, ".tar", ".mdb")) for source in sources)
        if self.names != "plain" and (nameless or sources == ("synthetic",)):
            raise ValueError(
                f"data.names={self.names} has no effect unless data.images names a folder"
            )
        return self


class Views(Section):
    """Which pixels the models see (method: 1 base view, local crops, 1 composite)."""

    height: int = Field(256, ge=PATCH * 2, description="height of the base view, in pixels")
    width: int = Field(128, ge=PATCH, description="width of the base view, in pixels")
    count: int = Field(
        4,
        ge=1,
        description="pinned base views per image (K): two of a geometry, plain and flipped",
    )
    composites: int = Field(
        1, ge=0, description="pinned composites per image (K'); 0 for methods that use none"
    )
    composite: Literal["same", "two", "scenes"] = Field(
        "same",
        description="the two persons of a composite: 'same' image twice (reference), 'two' images "
        "of one shard; or 'scenes': no pasting, crops of real images (data.scenes)",
    )
    scale: Range = Field((0.8, 1.0), description="area of a base view, as a share of the image")
    aspect: Range = Field((0.4, 0.6), description="width / height of a base view or local crop")
    crops: int = Field(2, ge=1, description="local crops per sample")
    crop_scale: Range = Field((0.05, 0.8), description="area of a crop, share of the base view")
    photometric: Literal["free", "pinned", "off"] = Field(
        "free",
        description="colour noise: 'free': fresh, on the student's pixels alone, so targets are of "
        "clean pixels; 'pinned': one for each pinned view, on the teacher's pixels too (reference)",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Views":
        if self.height != 2 * self.width or self.height % 128:
            raise ValueError(
                f"views.height={self.height}, views.width={self.width}: accepted are heights "
                "that are a multiple of 128 and twice the width (256x128, 128x64, ...)"
            )
        for name in ("scale", "crop_scale", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"views.{name}={[low, high]}: accepted is 0 < low <= high")
        if self.composite != "same" and not self.composites:
            raise ValueError(
                f"views.composite={self.composite} has no effect with views.composites=0; "
                "accepted is to leave it out, or views.composites of 1 and more"
            )
        return self
