"""What a weights file is: which teachers it loads into, strictly, and with what sizes.

A file is tried with every kind that its names suggest; it fits where every tensor is accounted for.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dpal.base.errors import ConfigError
from dpal.model.conv_teacher import ConvNetwork
from dpal.model.published.mobilesam import ENCODER, load_mobilesam
from dpal.model.published.solider import load_solider
from dpal.model.published.vit import LoadedVit, grid_of, load_vit
from dpal.model.timm_import import timm
from dpal.model.timm_teacher import timm_network
from dpal.model.weights import HEADS, WeightsFile, bare, count_of

SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
SWINS = {96: ("tiny", "small"), 128: ("base",), 192: ("large",)}
UNIHCP_PATCHES = 84 * 84
RESNETS = {  # blocks of every stage, and whether they are bottlenecks
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}
CONVNEXTS = {  # width of the first stage, blocks of the third
    (40, 6): "atto",
    (48, 6): "femto",
    (64, 6): "pico",
    (80, 8): "nano",
    (96, 9): "tiny",
    (96, 27): "small",
    (128, 27): "base",
    (192, 27): "large",
    (256, 27): "xlarge",
}


class Fit(NamedTuple):
    """One teacher that a file loads into.

    Attributes:
        recipe: keys of a `teacher` section.
        facts: what the tensors tell: (label, value).
        dropped: tensors that are left out on purpose, by group.
    """

    recipe: dict[str, Any]
    facts: tuple[tuple[str, str], ...]
    dropped: dict[str, int]


class Recognised(NamedTuple):
    """What a file fits, best first, and why it does not fit the kinds its names suggest."""

    fits: tuple[Fit, ...]
    refusals: tuple[str, ...]


def recognise(file: WeightsFile) -> Recognised:
    """Try `file` with every kind that its names suggest."""
    fits, refusals = [], []
    for kind in _suggested(file.state, file.path):
        try:
            fits.append(_fit(kind, file))
        except ConfigError as error:
            refusals.append(f"{kind}: {str(error).removeprefix(f'{file.path}: ')}")
    return Recognised(tuple(fits), tuple(refusals))


def _suggested(state: Mapping[str, Any], source: Path) -> list[str]:
    """Kinds (or timm names) whose marks are among the names; never decides that one fits."""
    if any(str(key).removeprefix("module.").startswith(ENCODER) for key in state):
        return ["mobilesam"]
    cut = bare(dict(state), source)
    names = cut.state
    if "semantic_embed_w.0.weight" in names:
        return ["solider"]
    if "patch_embed.projection.weight" in names:
        return ["sapiens"]
    if "layers.0.blocks.0.attn.relative_position_bias_table" in names:
        return _swins(names)
    if "part_token1" in names or "cls_pos" in names:
        return ["pass"]
    if "blocks.0.ls1.gamma" in names or "blocks.0.gamma_1" in names or "reg_token" in names:
        return _vits(names, "dinov3" if "pos_embed" not in names else "dinov2")
    if "layer4.0.conv1.weight" in names:
        return _resnets(names)
    if "stages.3.0.dwconv.weight" in names or "stages.3.blocks.0.conv_dw.weight" in names:
        return _convnexts(names)
    table = names.get("pos_embed")
    if not isinstance(table, Tensor) or table.ndim != 3:
        return []
    if "cls_token_pos_embed" in names or "backbone_module." in cut.prefixes:
        return ["unihcp"] if table.shape[1] == UNIHCP_PATCHES else ["path"]
    if table.shape[1] == UNIHCP_PATCHES:
        return ["unihcp"]
    grid = grid_of(table.shape[1] - 1)
    if grid is None:  # no row for the CLS token
        return ["path"]
    same_names = ["mae", "path"] if grid[0] == grid[1] else ["hap", "mae"]
    return same_names + _vits(names, "224")


def _vits(names: Mapping[str, Any], family: str) -> list[str]:
    weight = names.get("patch_embed.proj.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 4 or weight.shape[0] not in SIZES:
        return []
    stem = f"vit_{SIZES[weight.shape[0]]}_patch{weight.shape[2]}"
    registers = (
        "_reg4" if family == "dinov2" and names.keys() & {"reg_token", "register_tokens"} else ""
    )
    name = f"{stem}{registers}_{family}"
    return [name] if timm.is_model(name) else []


def _swins(names: Mapping[str, Any]) -> list[str]:
    weight = names.get("patch_embed.proj.weight")
    width = weight.shape[0] if isinstance(weight, Tensor) else 0
    sizes = SWINS.get(width, ())
    if len(sizes) > 1:
        sizes = (sizes[count_of(dict(names), r"layers\.2\.blocks\.(\d+)\.") > 6],)
    found = [f"swin_{size}_patch4_window{w}" for size in sizes for w in ("7_224", "12_384")]
    return [name for name in found if timm.is_model(name)]


def _resnets(names: Mapping[str, Any]) -> list[str]:
    blocks = (count_of(dict(names), rf"layer{k}\.(\d+)\.") for k in range(1, 5))
    stem = RESNETS.get((*blocks, "layer1.0.conv3.weight" in names))
    found = [] if stem is None else [stem, f"{stem}d"]  # the second with a deep stem
    deep = "conv1.0.weight" in names
    return [name for name in found if name.endswith("d") == deep and timm.is_model(name)]


def _convnexts(names: Mapping[str, Any]) -> list[str]:
    weight = names.get("stem.0.weight", names.get("downsample_layers.0.0.weight"))
    width = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 4 else 0
    size = CONVNEXTS.get((width, count_of(dict(names), r"stages\.2\.(?:blocks\.)?(\d+)\.")))
    version = "v2" if any(".grn." in key for key in names) else ""
    name = f"convnext{version}_{size}"
    return [name] if timm.is_model(name) else []


def _fit(kind: str, file: WeightsFile) -> Fit:
    if kind == "mobilesam":
        encoder, dropped = load_mobilesam(file.state, file.path)
        widths = [stage.blocks[0].conv1.conv.in_channels for stage in encoder.stages[:1]]
        widths += [stage.out_dim for stage in encoder.stages[1:]]
        facts = (
            (
                "network",
                f"TinyViT, widths {_join(widths)}, blocks {_join(map(_depth, encoder.stages))}",
            ),
            ("map", f"{encoder.neck[0].out_channels} channels, stride 16"),
            ("CLS", "none: the mean of the map stands in for it"),
        )
        return Fit({"kind": kind}, facts, dropped)
    if kind == "solider":
        swin, dropped = load_solider(file.state, file.path)
        facts = (
            (
                "network",
                f"Swin, widths {_join(swin.widths)}, blocks {_join(map(_depth, swin.stages))}",
            ),
            ("map", "stage3: stride 32; stage2: stride 16"),
            ("CLS", "none: the mean of the map stands in for it"),
        )
        return Fit({"kind": kind, "semantic_weight": 1.0}, facts, dropped)
    if kind in ("path", "mae", "hap", "pass", "unihcp", "sapiens"):
        return _fit_vit(kind, load_vit(kind, file.state, file.path))
    return _fit_timm(kind, file)


def _fit_vit(kind: str, loaded: LoadedVit) -> Fit:
    model: Any = loaded.model
    positions = loaded.positions
    count, (height, width) = positions.tokens.shape[1], positions.grid
    cls = (
        f"trained as far as the file tells, token norm {float(positions.tokens[:, :1].norm()):.3g}"
    )
    if not count:
        cls = "none: the mean of the patches stands in for it"
    elif positions.warning:
        cls = positions.warning
    facts = (
        ("network", _vit_text(model)),
        ("positions", f"{height} x {width} patches and {count} prefix tokens"),
        ("CLS", cls),
    )
    return Fit({"kind": kind}, facts, loaded.dropped)


def _fit_timm(name: str, file: WeightsFile) -> Fit:
    network = timm_network(name, file.path, "norm", (256, 128), "fp32")
    model: Any = network.model
    if isinstance(network, ConvNetwork):
        own = model.state_dict().keys()  # a norm behind the pooling is named like a head
        names = bare(file.state, file.path).state.keys() - own
        left = Counter(key.split(".")[0] for key in names if key.startswith(HEADS))
        return Fit({"kind": "timm", "name": name}, _conv_facts(network), dict(left))
    if hasattr(model, "layers"):
        facts = (("network", f"{type(model).__name__}, blocks {_join(map(_depth, model.layers))}"),)
        return Fit({"kind": "timm", "name": name}, facts, {})
    facts = (("network", _vit_text(model)), ("prefix", _prefix_text(model)))
    patch = model.patch_embed.patch_size[0]
    fed = [2 * (128 // patch) * patch, 128 // patch * patch]
    return Fit({"kind": "timm", "name": name, "input": fed}, facts, {})


def _conv_facts(network: ConvNetwork) -> tuple[tuple[str, str], ...]:
    model: Any = network.model
    rows = [row for row in model.feature_info if row["reduction"] >= 4]
    maps = ", ".join(f"stride {row['reduction']}: {row['num_chs']} channels" for row in rows)
    pooled = "what the network pools of its last map" if network.pools else "the mean of the map"
    return (
        ("network", f"{type(model).__name__}, {network.width} channels in its last map"),
        ("maps", f"{maps} (tap stage<k>: stride 4 * 2 ** k)"),
        ("CLS", pooled),
    )


def _vit_text(model: Any) -> str:
    patch = model.patch_embed.patch_size[0]
    heads = model.blocks[0].attn.num_heads
    size = f"ViT, width {model.embed_dim}, {len(model.blocks)} blocks, patch {patch}"
    return f"{size}, {heads} heads (by its width: no tensor tells their number)"


def _prefix_text(model: Any) -> str:
    registers = model.num_prefix_tokens - (model.cls_token is not None)
    cls = "a CLS token" if model.cls_token is not None else "no CLS token"
    return f"{cls}, {registers} register tokens" if registers else cls


def _depth(stage: Any) -> int:
    return len(stage.blocks)


def _join(numbers: Any) -> str:
    return "/".join(str(number) for number in numbers)
