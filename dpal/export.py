"""Write a trained student for others: timm's `local-dir:` folder, or ONNX; checked by features.

The folder needs timm and nothing of this package: the tensors carry timm's names, `config.json`
is timm's, and `load.py` sets what timm's configuration cannot say (another number of heads in the
last block of a ViT, a network without its head). Every export is loaded back and compared before
it may be used.

Legend: B images, N tokens, D width, H x W pixels.
"""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dpal.base.errors import DataError
from dpal.base.students import PATCH
from dpal.base.students import Student as StudentSpec
from dpal.base.teachers import IMAGENET_MEAN, IMAGENET_STD
from dpal.export_loaders import LOADERS
from dpal.model.student import SHAPES, Student, VitStudent
from dpal.model.students.pyramid import timm_arguments, timm_name
from dpal.model.timm_import import timm  # noqa: F401  (load.py imports timm after this door)
from dpal.pixels import normalise

ARCHITECTURES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
}
TOLERANCE = 1e-4  # largest error, as a share of the features' standard deviation
WEIGHTS, CONFIG, LOADER, ONNX = "model.safetensors", "config.json", "load.py", "model.onnx"


class Parity(NamedTuple):
    """How far the exported network is from the one that was trained.

    Attributes:
        max_abs_error: largest difference of any feature value.
        mean_abs_error: mean difference.
        feature_scale: standard deviation of the features, to read the errors against.
        num_images: views compared.
    """

    max_abs_error: float
    mean_abs_error: float
    feature_scale: float
    num_images: int


def timm_config(student: Student) -> dict[str, Any]:
    """The `config.json` of a student, in the format of timm's `local-dir:` and hub loaders."""
    family = _vit_config(student) if isinstance(student, VitStudent) else _pyramid_config(student)
    names = family.pop("names")
    height, width = student.input_size
    pretrained = {
        "input_size": [3, height, width],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "num_classes": 0,
        "pool_size": None,
        **names,
    }
    return {
        **family,
        "num_classes": 0,
        "num_features": student.embed_dim,
        "pretrained_cfg": pretrained,
        "patch_size": PATCH,
        "student": student.spec.model_dump(mode="json"),
    }


def _vit_config(student: VitStudent) -> dict[str, Any]:
    heads = [block.attn.num_heads for block in student.blocks]
    arguments = {
        "img_size": list(student.input_size),
        "num_heads": heads[0],
        "num_classes": 0,
        "global_pool": "token",
    }
    if student.spec.layer_scale:
        arguments["init_values"] = student.spec.layer_scale
    return {
        "architecture": ARCHITECTURES[student.embed_dim],
        "global_pool": "token",
        "model_args": arguments,
        "names": {"first_conv": "patch_embed.proj", "classifier": "head"},
        "heads_per_block": heads,
        "position_resize": student.positions,
    }


def _pyramid_config(student: Student) -> dict[str, Any]:
    own = student.timm_module.pretrained_cfg
    return {
        "architecture": timm_name(student.spec),
        "model_args": {**timm_arguments(student.spec), "num_classes": 0},
        "names": {key: own[key] for key in ("first_conv", "classifier") if key in own},
    }


def spec_of(config: dict[str, Any]) -> StudentSpec:
    """The student section behind a `config.json`, also of one that does not hold it.

    Raises:
        KeyError, TypeError, ValueError: it is not the configuration of an exported student.
    """
    if "student" in config:
        return StudentSpec.model_validate(config["student"])
    height, width = config["model_args"]["img_size"]
    sizes = {shape.width: (name, shape) for name, shape in SHAPES.items()}
    name, shape = sizes[config["num_features"]]
    values = {"name": name, "height": height, "width": width}
    values["positions"] = config["position_resize"]
    heads = [int(count) for count in config["heads_per_block"]]
    if heads[0] == shape.paper_heads:
        return StudentSpec.model_validate({**values, "last_heads": heads[-1]})
    return StudentSpec.model_validate({**values, "heads": "timm"})


def write_timm(student: Student, folder: Path) -> None:
    """Write weights, configuration and loader into an existing folder."""
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in student.timm_module.state_dict().items()
        if name != "mask_token"
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(timm_config(student), indent=2) + "\n")
    (folder / LOADER).write_text(LOADERS[student.spec.family])
    shutil.copymode(folder / LOADER, folder / WEIGHTS)  # safetensors lets only the owner read


def write_onnx(student: Student, path: Path) -> None:
    """Write an ONNX graph: `pixels` [B, 3, H, W], normalised, to `cls` [B, D], `patches` [B, N, D].

    The batch is dynamic; height and width are the student's own.
    """
    example = torch.zeros(2, 3, *student.input_size, device=student.device)
    names = ("pixels", "cls", "patches")
    with warnings.catch_warnings(), student.traceable():
        warnings.simplefilter("ignore")  # the tracer warns of branches on the (fixed) image size
        torch.onnx.export(
            student.eval(),
            (example,),
            str(path),
            input_names=list(names[:1]),
            output_names=list(names[1:]),
            dynamic_axes={name: {0: "batch"} for name in names},
            opset_version=17,
            dynamo=False,  # the other exporter needs a package more
        )


def check_timm(student: Student, folder: Path, views: np.ndarray) -> Parity:
    """Load the folder through its own `load.py` and compare features of `views`.

    Args:
        views: uint8 [B, H, W, 3], at the student's input size.

    Raises:
        DataError: when any feature differs by more than `TOLERANCE`.
    """
    spec = importlib.util.spec_from_file_location("dpal_exported_loader", folder / LOADER)
    assert spec is not None, folder
    assert spec.loader is not None, folder
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    exported: nn.Module = module.load(folder)[0]
    pixels, expected = _expected(student, views)
    with torch.no_grad():
        cls, patches = module.features(exported, pixels)
    found = torch.cat([cls[:, None], patches], dim=1)  # [B, 1 + N, D]
    return _compare(found, expected, folder / WEIGHTS)


def check_onnx(student: Student, path: Path, views: np.ndarray) -> Parity:
    """Run the graph in ONNX Runtime and compare features of `views` [B, H, W, 3]."""
    from dpal.model.onnx_import import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pixels, expected = _expected(student, views)
    cls, patches = session.run(["cls", "patches"], {"pixels": pixels.numpy()})
    found = torch.cat([torch.from_numpy(cls)[:, None], torch.from_numpy(patches)], dim=1)
    return _compare(found, expected, path)


@torch.no_grad()
def _expected(student: Student, views: np.ndarray) -> tuple[Tensor, Tensor]:
    """Normalised pixels [B, 3, H, W] and the student's own tokens [B, 1 + N, D], fp32, CPU."""
    student = student.cpu().float().eval()
    pixels = normalise(torch.from_numpy(np.ascontiguousarray(views)))
    tokens = student(pixels)
    return pixels, torch.cat([tokens.cls[:, None], tokens.patches], dim=1)


def _compare(found: Tensor, expected: Tensor, file: Path) -> Parity:
    error = (found - expected).abs()
    parity = Parity(float(error.max()), float(error.mean()), float(expected.std()), len(expected))
    accepted = TOLERANCE * parity.feature_scale
    if not parity.max_abs_error <= accepted:  # also true for NaN
        raise DataError(
            f"{file}: features differ from the trained student by up to "
            f"{parity.max_abs_error:.2e}; accepted is {accepted:.0e} "
            f"({TOLERANCE:.0e} of their standard deviation)"
        )
    return parity
