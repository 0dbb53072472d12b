"""Teachers from timm: ViTs, Swins and convolutional networks, from a file or by name, strictly
loaded.

Legend: B images, D width, gh x gw token grid.
"""

import difflib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError, StorageError
from dpal.model.conv_teacher import ONE_SIZE, ConvNetwork, with_counters
from dpal.model.swin_teacher import SwinNetwork, is_swin, is_swin_model
from dpal.model.timm_import import timm
from dpal.model.weights import bare, load_strictly, open_weights, read_weights, weights_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TimmNetwork:
    """A timm ViT read at one tap: CLS (or the mean of the patches) and the map of patches.

    Args:
        model: a ViT that takes any input size.
        tap: "norm" (all blocks and the final norm) or "block<k>" (output of block k, from 0).
    """

    def __init__(self, model: nn.Module, tap: str, precision: str) -> None:
        blocks: Any = model.blocks
        match = re.fullmatch(r"block(\d+)", tap)
        self.block = None if match is None else int(match[1])
        if tap != "norm" and (self.block is None or self.block >= len(blocks)):
            raise ConfigError(
                f"teacher.tap={tap!r}: accepted are 'norm' and 'block0' to 'block{len(blocks) - 1}'"
            )
        self.dtype = DTYPES[precision]
        self.model = model.eval().requires_grad_(False).to(self.dtype)
        self.width = int(model.embed_dim)
        self.patch = tuple(model.patch_embed.patch_size)
        self.multiple = max(self.patch)
        self.prefix = int(model.num_prefix_tokens)
        self.has_cls = getattr(model, "cls_token", None) is not None

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)

    def __call__(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float [B, 3, h, w] to CLS [B, D] and patches [B, D, gh, gw]."""
        grid = (planes.shape[2] // self.patch[0], planes.shape[3] // self.patch[1])
        planes = planes.to(self.dtype)
        if self.block is None:
            tokens = self.model.forward_features(planes)  # [B, prefix + N, D]
            prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        else:
            (seen,) = self.model.forward_intermediates(
                planes,
                indices=[self.block],
                return_prefix_tokens=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            # timm gives no pair where there are no prefix tokens
            patches, prefix = seen if self.prefix else (seen, seen[:, :0])
        patches = patches.float()
        cls = prefix[:, 0].float() if self.has_cls else patches.mean(1)
        return cls, patches.transpose(1, 2).unflatten(2, grid)


def timm_network(
    name: str, weights: Path, tap: str, input_size: tuple[int, int], precision: str
) -> TimmNetwork | SwinNetwork | ConvNetwork:
    """Build `name` and load `weights` strictly.

    The position embedding of a ViT keeps the grid of the weights and is resampled once, straight
    to each input. Raises ConfigError for an unknown name, keys that do not match, a network that
    takes one input size only, or another file type.
    """
    _check_name(name)
    state = read_weights(weights)
    model = _create(name, state, input_size)
    plain = not _is_vit(model) and not is_swin_model(model)
    if plain:
        state = bare(state, weights).state
    # timm's own converter of published layouts, e.g. of DINOv2 and OpenCLIP
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, RuntimeError, AssertionError, AttributeError, ValueError) as error:
            raise ConfigError(f"{weights}: not weights of {name!r} ({error})") from None
    load_strictly(model, with_counters(state, model) if plain else state, weights)
    if is_swin_model(model):
        return SwinNetwork(model, tap, DTYPES[precision])
    if plain:
        return ConvNetwork(model, tap, DTYPES[precision], name)
    return TimmNetwork(model, tap, precision)


def taught_network(weights: Path, precision: str) -> TimmNetwork:
    """The ViT whose timm arguments are in the metadata `arch` of its safetensors file."""
    file = open_weights(weights)
    arch = file.metadata.get("arch")
    if arch is None:
        raise ConfigError(f"{weights}: its metadata has no key 'arch' with the ViT's arguments")
    arguments = {**json.loads(arch), "num_classes": 0, "dynamic_img_size": True}
    model = timm.models.vision_transformer.VisionTransformer(**arguments)
    load_strictly(model, file.state, weights)
    return TimmNetwork(model, "norm", precision)


def weights_file(name: str, weights: str) -> Path:
    """The local file with the weights: the given one, or the hub's, fetched once.

    Raises:
        ConfigError: when the file or the name does not exist.
        StorageError: when the hub cannot be reached and the file was not fetched before.
    """
    if weights:
        return weights_path(weights)
    _check_name(name)
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id:
        raise ConfigError(
            f"teacher.name={name!r} has no weights on the hub; give a file as teacher.weights"
        )
    # Imported here: a run with local weights needs no network code.
    from huggingface_hub import hf_hub_download

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its retries would be a dozen lines; the reason is told below
    try:
        return Path(hf_hub_download(published.hf_hub_id, "model.safetensors"))
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise StorageError(
            f"weights of teacher.name={name!r} could not be fetched from the hub ({reason[0]}); "
            "give a local file as teacher.weights"
        ) from None
    finally:
        log.setLevel(level)


def _create(name: str, state: dict[str, Any], input_size: tuple[int, int]) -> nn.Module:
    """The network without its classifier, with random weights, at any input size if it can."""
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
    if is_swin(name):
        options["always_partition"] = True  # keep the window that was trained
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except TypeError:  # a convolutional network knows no image size
        model = timm.create_model(name, pretrained=False, num_classes=0)
        if _is_vit(model):
            raise ConfigError(f"teacher.name={name!r} {ONE_SIZE}") from None
        return model
    if _positions(state) != _positions(model.state_dict()):
        sized = timm.create_model(name, pretrained=False, img_size=input_size, **options)
        if _positions(state) == _positions(sized.state_dict()):
            model = sized
    return model


def _is_vit(model: nn.Module) -> bool:
    """Whether its tokens are a sequence: prefix tokens, then patches."""
    names = ("blocks", "patch_embed", "num_prefix_tokens", "forward_intermediates")
    return all(hasattr(model, name) for name in names)


def _positions(state: dict[str, Any]) -> int | None:
    value = state.get("pos_embed")
    return int(value.shape[1]) if isinstance(value, Tensor) and value.ndim == 3 else None


def _check_name(name: str) -> None:
    base = re.split(r"[.]", name)[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=1)
        hint = f"; nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"teacher.name={name!r} is no timm model{hint}")
