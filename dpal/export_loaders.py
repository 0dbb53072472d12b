"""The `load.py` that lies in every export folder: one text per family, needing timm alone.

Legend: B images, H x W pixels, N tokens, D width.
"""

_VIT = '''\
"""Load this backbone with timm and nothing else.

    from load import load
    model, transform = load()
    tokens = model.forward_features(transform(image)[None])  # [1, 1 + N, D]: CLS, then patches
"""

import json
from pathlib import Path

import timm
from timm.data import create_transform, resolve_model_data_config


def load(folder=Path(__file__).parent, **overrides):
    """Return (model in evaluation mode, transform for a PIL image)."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **overrides).eval()
    heads = json.loads((Path(folder) / "config.json").read_text())["heads_per_block"]
    for block, count in zip(model.blocks, heads, strict=True):
        block.attn.num_heads = count
        block.attn.head_dim = block.attn.qkv.in_features // count
        block.attn.scale = block.attn.head_dim**-0.5
    return model, create_transform(**resolve_model_data_config(model), is_training=False)


def features(model, pixels):
    """Global vectors [B, D] and patch tokens [B, N, D] of transformed images [B, 3, H, W]."""
    tokens = model.forward_features(pixels)
    return tokens[:, 0], tokens[:, 1:]
'''

_PYRAMID = '''\
"""Load this backbone with timm and nothing else.

    from load import features, load
    model, transform = load()
    vector, tokens = features(model, transform(image)[None])  # [1, D], [1, N, D]

`model` is timm's own network without its head; `model.forward_features(pixels)` is its last map.
"""

import json
from pathlib import Path

import timm
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch.nn.functional import interpolate


def load(folder=Path(__file__).parent, **overrides):
    """Return (model in evaluation mode, transform for a PIL image)."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    arguments = {**config["model_args"], **overrides}
    model = timm.create_model(config["architecture"], pretrained=False, **arguments)
    model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    settings = resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    return model.eval(), create_transform(**settings, is_training=False)


def features(model, pixels):
    """Global vectors [B, D] and tokens [B, N, D] of transformed images [B, 3, H, W].

    The tokens lie row by row on a grid of H / 16 x W / 16: the last map, up-sampled.
    """
    last = model.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[-1]
    factor = model.feature_info[-1]["reduction"] // 16
    size = (factor * last.shape[2], factor * last.shape[3])
    tokens = last
    if factor > 1:
        tokens = interpolate(last, size=size, mode="bicubic", align_corners=False)
    tokens = tokens[:, :, : pixels.shape[2] // 16, : pixels.shape[3] // 16]
    return last.mean(dim=(2, 3)), tokens.flatten(2).transpose(1, 2)
'''

LOADERS = {"vit": _VIT, "swin": _PYRAMID, "timm": _PYRAMID}
