"""Synthetic checkpoints in the layouts of published teachers: right names, small shapes."""

from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

import dpal.base.teachers as sections

State = dict[str, Tensor]
WIDTH, DEPTH, PATCHES = 128, 3, 16
VIEW = (64, 32)


def save(content: object, folder: Path, name: str = "weights.pth") -> Path:
    """A torch file with `content`."""
    path = folder / name
    torch.save(content, path)
    return path


def spec(kind: str, path: Path, **changes: object) -> sections.Teacher:
    """The `teacher` section of a file, fed with views of `VIEW`."""
    values = {"kind": kind, "weights": str(path), "input": VIEW, **changes}
    return TypeAdapter(sections.Teacher).validate_python(values)


def vit_state(positions: int, *, width: int = WIDTH, depth: int = DEPTH, seed: int = 0) -> State:
    """A ViT/16 in MAE's names with `positions` rows of pos_embed (CLS included or not)."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.1) -> Tensor:
        return scale * torch.randn(shape, generator=g)

    state = {
        "cls_token": draw(1, 1, width, scale=1.0),
        "pos_embed": draw(1, positions, width, scale=1.0),
        "patch_embed.proj.weight": draw(width, 3, PATCHES, PATCHES, scale=0.05),
        "patch_embed.proj.bias": draw(width),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            state[f"blocks.{i}.{name}.weight"] = draw(rows, columns)
            state[f"blocks.{i}.{name}.bias"] = draw(rows)
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = 1 + draw(width)
            state[f"blocks.{i}.{name}.bias"] = draw(width)
    return {**state, "norm.weight": 1 + draw(width), "norm.bias": draw(width)}


def mae_decoder(width: int = WIDTH) -> State:
    """What masked autoencoders are saved with beside the encoder."""
    return {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 5, 8),
        "decoder_embed.weight": torch.zeros(8, width),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "decoder_pred.weight": torch.zeros(4, 8),
    }


def path_file(variant: str) -> dict[str, object]:
    """The four file variants of PATH, with a 4 x 4 grid of positions."""
    state = vit_state(17)
    position, rows = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    if variant == "converted with CLS":
        return {"model": {**state, **mae_decoder()}}
    if variant == "converted without CLS":
        return {"model": {**state, "pos_embed": rows}}
    if variant == "large":
        return {"model": {**state, "pos_embed": rows, "cls_token_pos_embed": position}}
    raw = {**state, "pos_embed": rows, "cls_token_pos_embed": position}
    if variant == "raw of pose":
        del raw["cls_token"], raw["cls_token_pos_embed"]
    named = {f"module.backbone_module.{key}": value for key, value in raw.items()}
    named["module.neck_module.mix.weight"] = torch.zeros(2, 2)
    named["module.decoder_module.head.bias"] = torch.zeros(2)
    return {"state_dict": named, "step": 80_000}


def sapiens_names(state: State) -> State:
    """MAE's names as mmpretrain's, spelled out one by one."""
    renamed = {}
    for key, value in state.items():
        words = key.split(".")
        if words[0] == "blocks":
            inner = {
                "norm1": ["ln1"],
                "norm2": ["ln2"],
                "attn": ["attn"],
                "mlp": ["ffn", "layers"],
            }[words[2]]
            rest = words[3:]
            if words[2] == "mlp":
                rest = [*{"fc1": ["0", "0"], "fc2": ["1"]}[rest[0]], *rest[1:]]
            words = ["layers", words[1], *inner, *rest]
        elif words[0] == "norm":
            words[0] = "ln1"
        elif words[0] == "patch_embed":
            words[1] = "projection"
        renamed[".".join(words)] = value
    return renamed


def pass_file() -> dict[str, object]:
    """PASS: CLS and three part tokens, positions apart, a projection head, in `teacher`."""
    state = vit_state(8)
    g = torch.Generator().manual_seed(5)
    for i in (1, 2, 3):
        state[f"part_token{i}"] = torch.randn(1, 1, WIDTH, generator=g)
        state[f"part{i}_pos"] = torch.randn(1, 1, WIDTH, generator=g)
    state["cls_pos"] = torch.randn(1, 1, WIDTH, generator=g)
    named = {f"module.backbone.{key}": value for key, value in state.items()}
    named["module.head.mlp_cls.0.weight"] = torch.zeros(2, 2)
    return {"student": {}, "teacher": named, "epoch": 100}


def unihcp_file() -> dict[str, object]:
    """UniHCP: no CLS token, prefixes of a multi-task trainer."""
    state = vit_state(36)
    del state["cls_token"]
    named = {f"module.backbone_module.{key}": value for key, value in state.items()}
    return {"state_dict": {**named, "module.decoder_module.q.weight": torch.zeros(1, 2)}}


def solider_state(width: int = 16, depth: int = 2) -> State:
    """A SOLIDER Swin in mmdetection's names: windows of 7, heads of 16 channels."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.1) -> Tensor:
        return scale * torch.randn(shape, generator=g)

    def norm(name: str, size: int) -> State:
        return {f"{name}.weight": 1 + draw(size), f"{name}.bias": draw(size)}

    def linear(name: str, rows: int, columns: int) -> State:
        return {f"{name}.weight": draw(rows, columns), f"{name}.bias": draw(rows)}

    state = {
        "patch_embed.projection.weight": draw(width, 3, 4, 4),
        "patch_embed.projection.bias": draw(width),
        **norm("patch_embed.norm", width),
    }
    steps = torch.arange(7)
    down, right = (axis.flatten() for axis in torch.meshgrid(steps, steps, indexing="ij"))
    index = (down[:, None] - down + 6) * 13 + right[:, None] - right + 6
    for i in range(4):
        size = width * 2**i
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            state |= norm(f"{block}.norm1", size) | norm(f"{block}.norm2", size)
            state[f"{block}.attn.w_msa.relative_position_bias_table"] = draw(169, size // 16)
            state[f"{block}.attn.w_msa.relative_position_index"] = index
            state |= linear(f"{block}.attn.w_msa.qkv", 3 * size, size)
            state |= linear(f"{block}.attn.w_msa.proj", size, size)
            state |= linear(f"{block}.ffn.layers.0.0", 4 * size, size)
            state |= linear(f"{block}.ffn.layers.1", size, 4 * size)
        if i < 3:
            state |= norm(f"stages.{i}.downsample.norm", 4 * size)
            state[f"stages.{i}.downsample.reduction.weight"] = draw(2 * size, 4 * size)
        state |= norm(f"norm{i}", size)
        after = width * 2 ** min(i + 1, 3)
        state |= linear(f"semantic_embed_w.{i}", after, 2)
        state |= linear(f"semantic_embed_b.{i}", after, 2)
    return state


def solider_file() -> dict[str, object]:
    """The state as SOLIDER saves it."""
    named = {f"backbone.{key}": value for key, value in solider_state().items()}
    return {"teacher": {**named, "head.last_layer.weight_g": torch.zeros(1, 1)}, "epoch": 10}


def mobilesam_file() -> State:
    """MobileSAM's names: encoder of widths 8, 16, 32, 64, neck of 24 channels, other parts."""
    g = torch.Generator().manual_seed(0)
    state: State = {}
    widths, heads, windows, depths = (8, 16, 32, 64), (0, 1, 2, 4), (0, 7, 14, 7), (1, 1, 2, 1)

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=g)

    def conv(name: str, *shape: int) -> None:
        state[f"{name}.c.weight"] = draw(*shape)
        state[f"{name}.bn.weight"] = 1 + draw(shape[0])
        state[f"{name}.bn.bias"] = draw(shape[0])
        state[f"{name}.bn.running_mean"] = draw(shape[0])
        state[f"{name}.bn.running_var"] = 1 + draw(shape[0]).abs()
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)

    def affine(name: str, *shape: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 * draw(*shape), draw(shape[0])

    root = "image_encoder"
    conv(f"{root}.patch_embed.seq.0", 4, 3, 3, 3)
    conv(f"{root}.patch_embed.seq.2", 8, 4, 3, 3)
    for i, width in enumerate(widths):
        for j in range(depths[i]):
            block = f"{root}.layers.{i}.blocks.{j}"
            if i == 0:
                conv(f"{block}.conv1", 4 * width, width, 1, 1)
                conv(f"{block}.conv2", 4 * width, 1, 3, 3)
                conv(f"{block}.conv3", width, 4 * width, 1, 1)
                continue
            state[f"{block}.attn.attention_biases"] = draw(heads[i], windows[i] ** 2)
            affine(f"{block}.attn.norm", width)
            affine(f"{block}.attn.qkv", 3 * width, width)
            affine(f"{block}.attn.proj", width, width)
            affine(f"{block}.mlp.norm", width)
            affine(f"{block}.mlp.fc1", 4 * width, width)
            affine(f"{block}.mlp.fc2", width, 4 * width)
            conv(f"{block}.local_conv", width, 1, 3, 3)
        if i < 3:
            after = widths[i + 1]
            conv(f"{root}.layers.{i}.downsample.conv1", after, width, 1, 1)
            conv(f"{root}.layers.{i}.downsample.conv2", after, 1, 3, 3)
            conv(f"{root}.layers.{i}.downsample.conv3", after, after, 1, 1)
    affine(f"{root}.norm_head", 64)
    affine(f"{root}.head", 10, 64)
    state[f"{root}.neck.0.weight"] = draw(24, 64, 1, 1)
    state[f"{root}.neck.2.weight"] = draw(24, 24, 3, 3)
    affine(f"{root}.neck.1", 24)
    affine(f"{root}.neck.3", 24)
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 4)
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 4)
    return state
