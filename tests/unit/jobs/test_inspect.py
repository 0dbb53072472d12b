"""`dpal inspect`: what a file is, which teacher it fits, and whether its last block was trained."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpal.base.errors import EXIT_CONFIG, EXIT_DONE
from dpal.model.timm_import import timm
from jobs.__main__ import main

import teacher_files as files

ROOT = Path(__file__).parents[3]


def save(content: object, folder: Path, name: str = "weights.pth") -> str:
    torch.save(content, folder / name)
    return str(folder / name)


def inspect(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["inspect", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (files.path_file("raw"), ["teacher.kind=path:", "4 x 4 patches", "trained as far as"]),
        (files.path_file("large"), ["teacher.kind=path:", "prefix tokens", "under 'model'"]),
        (files.path_file("converted without CLS"), ["kind=path:", "CLS was not trained"]),
        (files.path_file("converted with CLS"), ["kind=mae:", "also fits  teacher.kind=path"]),
        ({"model": files.vit_state(9)}, ["teacher.kind=hap:", "4 x 2 patches"]),
        (files.pass_file(), ["teacher.kind=pass:", "4 prefix tokens", "head 1", "under 'teacher'"]),
        (files.sapiens_names(files.vit_state(17)), ["teacher.kind=sapiens:", "at the top"]),
        (files.solider_file(), ["teacher.kind=solider:", "widths 16/32/64/128", "semantic_weight"]),
        (files.mobilesam_file(), ["teacher.kind=mobilesam:", "24 channels", "mask_decoder 1"]),
    ],
)  # fmt: skip
def test_a_file_says_which_teacher_it_is(tmp_path, capsys, content, words) -> None:
    code, out, _ = inspect(capsys, save(content, tmp_path))
    assert code == EXIT_DONE
    for word in words:
        assert word in out


def test_unihcp_is_told_from_path_by_its_84_by_84_positions(tmp_path, capsys) -> None:
    state = files.vit_state(84 * 84)
    del state["cls_token"]
    named = {f"module.backbone_module.{key}": value for key, value in state.items()}
    code, out, _ = inspect(capsys, save({"state_dict": named}, tmp_path))
    assert code == EXIT_DONE
    assert "teacher.kind=unihcp:" in out
    assert "84 x 84 patches and 0 prefix tokens" in out
    assert "prefixes   module., backbone_module." in out


def test_a_timm_file_says_its_name(tmp_path, capsys) -> None:
    path = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    code, out, _ = inspect(capsys, str(path))
    assert code == EXIT_DONE
    assert "name vit_tiny_patch16_224" in out
    assert "safetensors" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", ["name resnet18:", "stride 16: 256 channels", "left out   fc 2"]),
        ("convnext_atto", ["name convnext_atto:", "stride 16: 160 channels", "left out   head 2"]),
    ],
)
def test_a_convolutional_network_says_its_name_its_maps_and_what_is_left_out(
    tmp_path, capsys, name, words
) -> None:
    state = timm.create_model(name, num_classes=3).state_dict()
    code, out, _ = inspect(capsys, save({"state_dict": state}, tmp_path))
    assert code == EXIT_DONE
    for word in (*words, "what the network pools"):
        assert word in out
    lacking = {key: value for key, value in state.items() if "bn2" not in key}
    lacking.pop("stages.1.blocks.0.norm.bias", None)
    code, out, _ = inspect(capsys, save(lacking, tmp_path))
    assert code == EXIT_CONFIG
    assert f"{name}: does not fit" in out


@pytest.mark.parametrize("head", [True, False])
def test_a_convnext_in_its_authors_names_is_known_with_and_without_a_classifier(
    tmp_path, capsys, head
) -> None:
    named = {}
    for key, value in timm.create_model("convnext_atto", num_classes=3).state_dict().items():
        if "head.fc" in key and not head:
            continue
        key = key.replace("head.fc.", "head.").replace("head.norm.", "norm.")
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        named[key] = value
    assert "downsample_layers.3.1.weight" in named
    code, out, _ = inspect(capsys, save({"model": named}, tmp_path))
    assert code == EXIT_DONE
    assert "name convnext_atto:" in out
    assert ("left out   head 2" in out) == head


def test_a_file_that_fits_nothing_says_what_is_wrong_and_exits_with_2(tmp_path, capsys) -> None:
    content = files.solider_file()
    del content["teacher"]["backbone.norm3.bias"]
    code, out, _ = inspect(capsys, save(content, tmp_path))
    assert code == EXIT_CONFIG
    assert "no kind of teacher" in out
    assert "solider: does not fit SoliderSwin: missing norm3.bias" in out
    code, out, _ = inspect(capsys, save({"a.weight": torch.zeros(1)}, tmp_path))
    assert code == EXIT_CONFIG
    assert "no layout that is known" in out


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_missing_files_and_pickled_code_are_one_sentence(tmp_path, capsys) -> None:
    code, _, err = inspect(capsys, str(tmp_path / "none.pth"))
    assert code == EXIT_CONFIG
    assert "does not exist" in err
    code, out, err = inspect(capsys, save({"model": Evil()}, tmp_path))
    assert code == EXIT_CONFIG
    assert "never run" in err
    assert err.count("\n") == 1
    assert "ran\n" not in out + err.replace("never run", "")


def decayed(state: files.State, factor: float) -> files.State:
    """The last block's matrices shrunk, everything else trained away from where it was."""
    other = files.vit_state(17, seed=9)
    last = f"blocks.{files.DEPTH - 1}."
    kept = {k: v for k, v in state.items() if k.startswith((last, "norm."))}
    return {**other, **{k: v * factor if v.ndim == 2 else v for k, v in kept.items()}}


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.1, "was not trained: its matrices are the second file's, decayed to 0.10 to 0.10"),
        (1.0, "the second file's, unchanged"),
        (0.7, "at another scale: hardly trained"),
    ],
)
def test_an_untrained_last_block_is_told_by_direction_and_norm(
    tmp_path, capsys, factor, words
) -> None:
    first = files.vit_state(17)
    mae = save({"model": first}, tmp_path, "mae.pth")
    code, out, _ = inspect(capsys, save({"model": decayed(first, factor)}, tmp_path), mae)
    assert code == EXIT_DONE
    assert words in out
    (row,) = [line.split() for line in out.splitlines() if "blocks.2.attn.qkv.weight" in line]
    assert float(row[1]) == pytest.approx(factor, abs=1e-3)
    assert float(row[2]) == pytest.approx(1, abs=1e-3)
    assert "  norm.bias" in out


def test_a_trained_last_block_is_said_to_be_trained(tmp_path, capsys) -> None:
    one = save({"model": files.vit_state(17)}, tmp_path, "one.pth")
    two = save({"model": files.vit_state(17, seed=4)}, tmp_path, "two.pth")
    assert "block 2 was trained" in inspect(capsys, one, two)[1]
    assert "these files cannot tell" in inspect(capsys, one, one)[1]


def test_files_of_other_sizes_are_not_compared(tmp_path, capsys) -> None:
    one = save({"model": files.vit_state(17)}, tmp_path, "one.pth")
    for name, other in (
        ("deep.pth", files.vit_state(17, depth=4)),
        ("sam.pth", files.mobilesam_file()),
    ):
        code, _, err = inspect(capsys, one, save(other, tmp_path, name))
        assert code == EXIT_CONFIG
        assert "accepted are two ViTs of one depth" in err


def test_sapiens_files_compare_under_their_own_names(tmp_path, capsys) -> None:
    one = save(files.sapiens_names(files.vit_state(17)), tmp_path, "one.pth")
    two = save({"model": files.vit_state(17, seed=4)}, tmp_path, "two.pth")
    code, out, _ = inspect(capsys, one, two)
    assert code == EXIT_DONE
    assert "blocks.2.mlp.fc2.weight" in out
    assert "block 2 was trained" in out


def test_the_real_files_are_recognised(capsys) -> None:
    folder = ROOT.parent / "shared" / "weights"
    expected = {
        "mobile_sam.pt": "teacher.kind=mobilesam",
        "vit_small_patch14_saliency_timm_fp16.pth": "name vit_small_patch14_dinov2",
        "reid-0267_global_dense.onnx": "teacher.kind=onnx",
    }
    if not all((folder / name).is_file() for name in expected):
        pytest.skip("no real weights in ../shared/weights")
    for name, words in expected.items():
        code, out, _ = inspect(capsys, str(folder / name))
        assert code == EXIT_DONE
        assert words in out


def test_what_is_no_weights_file_is_called_so(tmp_path, capsys) -> None:
    text = tmp_path / "notes.pth"
    text.write_text("# notes\n")
    code, _, err = inspect(capsys, str(text))
    assert (code, "is no torch file" in err) == (EXIT_CONFIG, True)
    code, _, err = inspect(capsys, str(tmp_path))
    assert (code, "is a folder; accepted are weights files" in err) == (EXIT_CONFIG, True)
