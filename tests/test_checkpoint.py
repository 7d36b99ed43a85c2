"""Whatever the wrapper and the names, the network loaded answers as the one that was saved; or it is refused."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from replk_deploy import checkpoint, weights
from replk_deploy.checkpoint import Loaded, load
from replk_deploy.errors import CheckpointError, Exit
from replk_deploy.fuse import fuse
from replk_deploy.metadata import Metadata
from replk_deploy.models.replknet import VARIANTS, RepLKGeometry, RepLKNet
from replk_deploy.preprocess import from_args
from replk_deploy.proof import cast
from tests import networks

DEEP = RepLKGeometry(
    channels=(4, 6, 8, 10),
    depths=(2, 2, 3, 2),
    kernels=(13, 11, 9, 7),
    small=5,
    dw_channels=(4, 6, 8, 10),
    ffn_channels=(8, 12, 16, 20),
    classes=7,
)
PLAIN_BACKBONE = RepLKGeometry(
    channels=(4, 6, 8, 10),
    depths=(1, 1, 1, 1),
    kernels=(13, 11, 9, 7),
    small=3,
    dw_channels=(4, 6, 8, 10),
    ffn_channels=(8, 12, 16, 20),
    classes=None,
    out_indices=(0, 1, 2, 3),
)
SUBSET = RepLKGeometry(
    channels=(4, 6, 8, 10),
    depths=(1, 1, 1, 1),
    kernels=(13, 11, 9, 7),
    small=None,
    dw_channels=(6, 9, 12, 15),
    ffn_channels=(8, 12, 16, 20),
    classes=None,
    out_indices=(1, 3),
    norms=(1, 3),
)
State = dict[str, Tensor]


def state(model) -> State:
    return dict(model.state_dict())


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def answers(model, images: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return cast(model, torch.float64)(images.double())


def pictures(size: tuple[int, int] = (40, 33)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def alike(found, wanted) -> None:
    """Compare networks by their answers in float64 and by every tensor."""
    pairs = list(zip(answers(found, pictures()), answers(wanted, pictures()), strict=True))
    assert pairs
    for got, expected in pairs:
        assert expected.std() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert found.state_dict().keys() == wanted.state_dict().keys()


def refused(path: Path, **options: str) -> CheckpointError:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    assert caught.value.code == Exit.USAGE
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    assert sorted(path.parent.rglob("*")) == before
    return caught.value


# wrappers and layouts ------------------------------------------------------------------------------------------------

WRAPPERS: dict[str, tuple[Callable[[State], object], str]] = {
    "bare": (lambda s: s, "bare"),
    "model": (lambda s: {"model": s, "optimizer": {}, "epoch": 1}, "model"),
    "state_dict": (lambda s: {"state_dict": s, "meta": {"epoch": 1}}, "state_dict"),
    "module": (lambda s: {"module": s}, "module"),
    "DDP": (lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}, "model / module."),
    "compiled": (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, "_orig_mod."),
    "compiled in DDP": (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "module. / _orig_mod."),
    "without counters": (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, "bare"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_gives_the_network_that_was_saved(wrapper: str, trained, tmp_path: Path) -> None:
    wrap, said = WRAPPERS[wrapper]
    loaded = load(save(tmp_path / "x.pth", wrap(state(trained))))
    alike(loaded.model, trained)
    assert (loaded.wrapper, loaded.layout, loaded.form) == (said, "reference", "training")
    assert loaded.model.geometry == networks.SMALL
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize(
    "geometry", [networks.SMALL, networks.LIKE_XL, networks.BACKBONE, PLAIN_BACKBONE, SUBSET, DEEP]
)
@pytest.mark.parametrize("form", ["training", "merged", "folded"])
def test_every_form_and_geometry_is_read_from_the_tensors(geometry: RepLKGeometry, form: str, tmp_path: Path) -> None:
    model = networks.trained(geometry)
    if form != "training":
        model = cast(fuse(model, level="merge" if form == "merged" else "full").model, torch.float32)
    assert model.form == form
    loaded = load(save(tmp_path / "x.pth", state(model)))
    alike(loaded.model, model)
    assert loaded.form == form
    inferred = loaded.model.geometry
    small = geometry.small if form == "training" else None
    assert inferred == RepLKGeometry(**{f: getattr(geometry, f) for f in geometry.__slots__} | {"small": small})


@pytest.mark.parametrize("form", ["training", "merged", "folded"])
def test_bare_safetensors_and_legacy_torch_files_are_read(form: str, trained, tmp_path: Path) -> None:
    level = {"merged": "merge", "folded": "full"}
    model = cast(fuse(trained, level=level[form]).model, torch.float32) if form in level else trained
    save_file(state(model), tmp_path / "x.safetensors")
    torch.save(state(model), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    for name in ("x.safetensors", "x.pth"):
        loaded = load(tmp_path / name)
        alike(loaded.model, model)
        assert (loaded.form, loaded.wrapper, loaded.metadata) == (form, "bare", None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_keep_their_values(dtype: torch.dtype, trained, tmp_path: Path) -> None:
    stored = cast(trained, dtype)
    loaded = load(save(tmp_path / "x.pth", state(stored)))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    alike(loaded.model, stored)


def test_averaged_weights_are_another_network_and_taken_only_when_asked_for(trained, tmp_path: Path) -> None:
    averaged = networks.trained(seed=1)
    path = save(tmp_path / "x.pth", {"model": state(trained), "model_ema": state(averaged)})
    raw, ema = load(path), load(path, source="ema")
    alike(raw.model, trained)
    alike(ema.model, averaged)
    assert [w for w in raw.warnings if "--weights ema" in w]
    assert not [w for w in ema.warnings if "averaged" in w]
    assert (raw.wrapper, raw.ignored, ema.wrapper, ema.ignored) == ("model", ("model_ema",), "model_ema", ("model",))


def test_averaged_weights_that_are_not_there_are_refused(checkpoint_file: Path) -> None:
    assert "no averaged weights" in refused(checkpoint_file, source="ema").problem


def mm(model, *, heads: bool) -> State:
    """Name a classifier as mmpretrain does, or a backbone as mmsegmentation and mmdetection do."""
    named = {}
    for key, value in state(model).items():
        if key.startswith("norm."):
            named["backbone.stages.3." + key] = value
        elif key.startswith("head."):
            named["head.fc." + key.removeprefix("head.")] = value
        else:
            named["backbone." + key] = value
    if heads:
        for head in ("decode_head", "auxiliary_head", "neck", "rpn_head", "roi_head", "bbox_head", "mask_head"):
            named[f"{head}.convs.0.conv.weight"] = torch.ones(2, 3)
        named["data_preprocessor.mean"] = torch.zeros(3, 1, 1)
    return named


def test_an_mmpretrain_classifier_gets_its_norm_and_head_back(trained, tmp_path: Path) -> None:
    for wrapped in ({"state_dict": mm(trained, heads=False), "meta": {}}, mm(trained, heads=False)):
        loaded = load(save(tmp_path / "x.pth", wrapped))
        alike(loaded.model, trained)
        assert loaded.layout == "mm backbone"
        assert loaded.model.geometry == networks.SMALL


@pytest.mark.parametrize("geometry", [networks.BACKBONE, PLAIN_BACKBONE, SUBSET])
def test_an_mm_backbone_is_taken_and_its_task_heads_are_named(geometry: RepLKGeometry, tmp_path: Path) -> None:
    model = networks.trained(geometry)
    loaded = load(save(tmp_path / "x.pth", {"meta": {}, "state_dict": mm(model, heads=True), "optimizer": {}}))
    alike(loaded.model, model)
    assert loaded.layout == "mm backbone"
    assert loaded.model.geometry == geometry
    heads = {k for k in mm(model, heads=True) if not k.startswith("backbone.")}
    assert len(heads) == 8
    assert set(loaded.ignored) == heads | {"meta", "optimizer"}


def test_an_unknown_tensor_beside_an_mm_backbone_is_not_ignored(trained, tmp_path: Path) -> None:
    found = refused(save(tmp_path / "x.pth", mm(trained, heads=True) | {"prompt_head.weight": torch.ones(2)}))
    assert re.search(r"unexpected 1: prompt_head\.weight$", found.problem, re.MULTILINE)


# heads


def with_heads(model, *names: str) -> State:
    body = {k: v for k, v in state(model).items() if not k.startswith("head.")}
    for factor, name in enumerate(names, start=1):
        body |= {f"head.{name}.weight": model.head.weight * factor, f"head.{name}.bias": model.head.bias * factor}
    return body


def test_a_head_with_a_name_is_the_head(trained, tmp_path: Path) -> None:
    alike(load(save(tmp_path / "x.pth", with_heads(trained, "cls_22k"))).model, trained)


def test_of_several_heads_one_must_be_chosen(trained, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", with_heads(trained, "cls_1k", "cls_22k", "places"))
    found = refused(path)
    assert "--head cls_1k" in str(found)
    assert "cls_22k, places" in str(found)
    (plain,) = answers(trained, pictures())
    for factor, name in enumerate(("cls_1k", "cls_22k", "places"), start=1):
        loaded = load(path, head=name)
        torch.testing.assert_close(answers(loaded.model, pictures())[0], factor * plain, rtol=1e-5, atol=1e-5)
        rest = {"cls_1k", "cls_22k", "places"} - {name}
        assert set(loaded.ignored) == {f"head.{r}.{leaf}" for r in rest for leaf in ("weight", "bias")}
        assert [w for w in loaded.warnings if f"only {name}" in w]


@pytest.mark.parametrize("heads", [(), ("cls_1k", "cls_22k"), ("cls_1k",)])
def test_a_head_that_is_not_there_is_refused(heads: tuple[str, ...], trained, tmp_path: Path) -> None:
    content = with_heads(trained, *heads) if heads else state(trained)
    problem = refused(save(tmp_path / "x.pth", content), head="cls_73m").problem
    assert "cls_73m" in problem
    assert (", ".join(heads) or "none") in problem


def test_two_tensors_with_one_name_are_never_one_tensor_lost(trained, tmp_path: Path) -> None:
    plain = state(trained)
    for content in (
        plain | with_heads(trained, "cls_22k"),
        with_heads(trained, "cls_22k") | plain,
        {f"backbone.{k}": v for k, v in plain.items()} | {"stem.0.conv.weight": plain["stem.0.conv.weight"] * 2},
        mm(trained, heads=False) | {"norm.weight": plain["norm.weight"] * 2},
    ):
        assert re.search(
            r"two of its tensors are (head|stem\.0\.conv|norm)\.(weight|bias)",
            refused(save(tmp_path / "x.pth", content)).problem,
        )


# MegEngine


def megengine(model, *, bn_4d: bool) -> dict:
    """Name and shape weights as the MegEngine code does; typed out here, not shared with what is tested.

    Its network is a flat list of blocks: one per RepLK block with its feed-forward half, one per
    down-sampling. Grouped kernels have five dimensions, biases four; colours run blue, green, red.
    """
    depths = model.geometry.depths
    first, samplers, at = [], [], 0
    for depth in depths:
        first.append(at)
        at += depth
        samplers.append(at)
        at += 1
    found = {}
    for key, value in model.state_dict().items():
        parts, leaf = key.split("."), key.rsplit(".", 1)[1]
        if leaf == "num_batches_tracked":
            continue
        name = key
        if parts[0] == "stem":
            name = ".".join(["stem", str(2 * int(parts[1])), *parts[2:]])
        elif parts[0] == "transitions":
            name = ".".join(["blocks", str(samplers[int(parts[1])]), str(2 * int(parts[2])), *parts[3:]])
        elif parts[0] == "stages":
            stage, block = int(parts[1]), int(parts[3])
            own = f"blocks.{first[stage] + block // 2}."
            rest = ".".join(parts[4:])
            if block % 2 == 0:
                rest = rest.replace("prelkb_bn.", "pre_bn.")
                rest = rest.replace("large_kernel.lkb_origin.", "dw.dw_large.")
                rest = rest.replace("large_kernel.small_conv.", "dw.dw_small_5.")
            else:
                rest = rest.replace("preffn_bn.", "premlp_bn.")
                rest = re.sub(r"^pw1\.", "mlp.fc1.", rest)
                rest = re.sub(r"^pw2\.", "mlp.fc2.", rest)
            name = own + rest
        array = value.numpy()
        depthwise = array.ndim == 4 and array.shape[1] == 1 and array.shape[2] > 1
        if depthwise:
            array = array.reshape(array.shape[0], 1, 1, *array.shape[2:])
        elif (
            array.ndim == 1
            and bn_4d
            and leaf in ("bias", "weight", "running_mean", "running_var")
            and "head" not in key
        ):
            array = array.reshape(1, -1, 1, 1)
        if key == "stem.0.conv.weight":
            array = array[:, [2, 1, 0]]
        found[name] = array
    return found


def test_the_names_of_the_released_megengine_network_are_those_of_its_code() -> None:
    """Depths 2, 2, 18, 2: blocks 2, 5 and 24 halve the map; checks the test's own map against published facts."""

    class Named:
        geometry = VARIANTS["RepLKNet-31B"]

        def state_dict(self):
            shapes = {k: v.shape for k, v in RepLKNet.empty(self.geometry, "training").state_dict().items()}
            return {k: torch.ones(()).expand(shape) for k, shape in shapes.items()}

    names = set(megengine(Named(), bn_4d=False))
    assert {f"blocks.{n}.dw.dw_large.conv.weight" for n in (0, 1, 3, 4, *range(6, 24), 25, 26)} < names
    assert len([n for n in names if "dw_large.conv" in n]) == 24
    assert {f"blocks.{n}.{i}.conv.weight" for n in (2, 5, 24) for i in (0, 2)} < names
    assert {f"stem.{i}.bn.running_mean" for i in (0, 2, 4, 6)} < names
    assert {"blocks.26.mlp.fc2.bn.bias", "blocks.0.premlp_bn.weight", "blocks.3.pre_bn.bias", "norm.bias"} < names


@pytest.mark.parametrize("geometry", [DEEP, networks.SMALL])
@pytest.mark.parametrize("bn_4d", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {"model": s}])
def test_a_megengine_pickle_answers_red_first_as_it_did_blue_first(geometry, bn_4d, wrap, tmp_path: Path) -> None:
    model = networks.trained(geometry)
    path = tmp_path / "replknet_basecls.pkl"
    path.write_bytes(pickle.dumps(wrap(megengine(model, bn_4d=bn_4d))))
    loaded = load(path)
    assert loaded.layout == "MegEngine"
    assert loaded.model.geometry == geometry
    (got,), (wanted,) = answers(loaded.model, pictures()), answers(model, pictures())
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    (swapped,) = answers(loaded.model, pictures().flip(1))
    assert (swapped - wanted).norm() / wanted.norm() > 1e-2, "colours in the wrong order make no difference here"


def test_what_the_megengine_file_holds_is_really_blue_first() -> None:
    model = networks.trained(DEEP)
    stored = torch.from_numpy(megengine(model, bn_4d=False)["stem.0.conv.weight"].copy())
    blue_first = pictures().flip(1).float()
    torch.testing.assert_close(
        torch.nn.functional.conv2d(blue_first, stored),
        torch.nn.functional.conv2d(pictures().float(), model.stem[0].conv.weight),
    )


def test_a_megengine_file_that_lost_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    arrays = megengine(networks.trained(DEEP), bn_4d=False)
    del arrays["blocks.4.dw.dw_large.conv.weight"]
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(arrays))
    found = refused(path).problem
    assert "missing 1: stages.1.blocks.2.large_kernel.lkb_origin.conv.weight" in found
    assert "unexpected" not in found


def test_a_deployed_megengine_file_is_refused(tmp_path: Path) -> None:
    arrays = {k.replace("dw.dw_large.conv", "dw"): v for k, v in megengine(networks.trained(DEEP), bn_4d=False).items()}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(arrays))
    assert "converted for deployment" in refused(path).problem


# full size: shapes only ----------------------------------------------------------------------------------------------


def counts(geometry: RepLKGeometry, form: str) -> tuple[int, int, int, int]:
    model = RepLKNet.empty(geometry, form)
    modules = list(model.modules())
    return (
        len(model.state_dict()),
        sum(p.numel() for p in model.parameters()),
        sum(isinstance(m, torch.nn.BatchNorm2d) for m in modules),
        sum(isinstance(m, torch.nn.Conv2d) for m in modules),
    )


@pytest.mark.parametrize(
    ("name", "training", "merged", "folded"),
    [
        (
            "RepLKNet-31B",
            (1171, 79_864_168, 203, 154),
            (931, 79_527_272, 155, 130),
            (262, 79_388_776, 0, 130),
        ),
        (
            "RepLKNet-31L",
            (1171, 172_671_016, 203, 154),
            (931, 172_165_672, 155, 130),
            (262, 171_957_928, 0, 130),
        ),
        (
            "RepLKNet-XL",
            (1027, 335_435_752, 179, 130),
            (931, 335_399_656, 155, 130),
            (262, 335_110_632, 0, 130),
        ),
    ],
)
def test_published_variants_have_the_published_counts_and_are_known_by_shape(name, training, merged, folded) -> None:
    geometry = VARIANTS[name]
    for form, wanted in (("training", training), ("merged", merged), ("folded", folded)):
        assert counts(geometry, form) == wanted
        shapes = {k: tuple(v.shape) for k, v in RepLKNet.empty(geometry, form).state_dict().items()}
        inferred, found = RepLKNet.infer(shapes)
        assert found == form
        if form == "training":
            assert inferred == geometry
            assert inferred.label == name


def test_heads_and_stage_norms_change_the_counts_as_published() -> None:
    def changed(name: str, **changes: object) -> RepLKGeometry:
        return RepLKGeometry(**{f: getattr(VARIANTS[name], f) for f in VARIANTS[name].__slots__} | changes)

    wide = {n: counts(changed(n, classes=21841), "training")[1] for n in VARIANTS}
    assert list(wide.values()) == [101_226_193, 204_703_633, 378_138_961]
    stages = {"classes": None, "out_indices": (0, 1, 2, 3)}
    assert counts(changed("RepLKNet-31B", **stages), "training")[0] == 1171 - 7
    assert counts(changed("RepLKNet-XL", **stages, norms=(0, 1, 2, 3)), "training")[0] == 1040


# what the arguments say ----------------------------------------------------------------------------------------------


def test_arguments_that_agree_raise_no_doubt(checkpoint_file: Path) -> None:
    loaded = load(checkpoint_file)
    assert loaded.warnings == ()
    assert loaded.label == "RepLKNet-test"
    assert loaded.preprocessing.size == (64, 64)
    assert loaded.preprocessing.said_by == "checkpoint"
    assert set(loaded.ignored) == {"optimizer", "epoch", "scaler", "args"}


@pytest.mark.parametrize("before", ["net.", "trainer.model.net."])
def test_a_prefix_that_is_not_known_is_named_with_the_line_that_strips_it(before: str, trained, tmp_path: Path) -> None:
    whole = {f"{before}{name}": tensor for name, tensor in state(trained).items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": whole}, tmp_path / "x.pth")
    found = refused(tmp_path / "x.pth")
    assert f"under the prefix {before!r}: {len(whole) - 1} of its {len(whole)} tensors" in found.problem
    code = found.remedy.partition(": ")[2].replace("'bare.pth'", "path")
    eval(code, {"torch": torch, "state": whole, "path": tmp_path / "bare.pth"})  # noqa: S307  # our own words
    alike(load(str(tmp_path / "bare.pth")).model, trained)


def test_a_run_folder_is_told_with_the_files_in_it(tmp_path: Path) -> None:
    for name in ("manifest.json", "fused.safetensors", "model.fp32.onnx", "report.md"):
        (tmp_path / name).touch()
    found = refused(tmp_path)
    assert found.problem == f"{tmp_path} is a run folder, and one file is wanted"
    assert found.remedy.endswith(f": {tmp_path}/fused.safetensors, {tmp_path}/model.fp32.onnx")


def test_a_name_that_is_no_line_of_text_is_no_label(trained, tmp_path: Path) -> None:
    path = networks.save_as_trained(trained, tmp_path / "x.pth", model="a\n::error::b")
    assert load(path).label == trained.geometry.label


def test_arguments_that_disagree_are_a_doubt_and_the_tensors_are_believed(trained, tmp_path: Path) -> None:
    path = networks.save_as_trained(trained, tmp_path / "x.pth", model="RepLKNet-XL", nb_classes=1000)
    loaded = load(path)
    assert loaded.model.geometry == networks.SMALL
    assert loaded.label == networks.SMALL.label
    assert any("RepLKNet-XL" in w for w in loaded.warnings)
    assert any("1000 classes" in w and "10" in w for w in loaded.warnings)
    assert len(loaded.warnings) == 2
    alike(loaded.model, trained)


@pytest.mark.parametrize("odd", [{"model": 3}, {"nb_classes": "ten"}, {"input_size": "big"}, {"model": None}])
def test_arguments_of_odd_types_do_not_matter(odd: dict, trained, tmp_path: Path) -> None:
    alike(load(networks.save_as_trained(trained, tmp_path / "x.pth", **odd)).model, trained)


def test_norms_that_were_never_updated_are_a_doubt(trained, tmp_path: Path) -> None:
    content = {k: v.clone() for k, v in state(trained).items()}
    fresh = ["stem.1.bn", "stages.2.blocks.2.large_kernel.small_conv.bn", "transitions.0.1.bn", "norm"]
    for name in fresh:
        content[f"{name}.running_mean"].zero_()
        content[f"{name}.running_var"].fill_(1)
    (doubt,) = load(save(tmp_path / "x.pth", content)).warnings
    assert doubt.startswith("4 of 51 BatchNorms were never updated: stem.1.bn")
    content["norm.running_mean"][0] = 1e-3
    content["stem.1.bn.running_var"][0] = 1.001
    (doubt,) = load(save(tmp_path / "x.pth", content)).warnings
    assert doubt.startswith("2 of 51")


# exact fit -----------------------------------------------------------------------------------------------------------


def test_one_missing_one_unexpected_and_one_misshaped_tensor_are_named_together(trained, tmp_path: Path) -> None:
    content = state(trained)
    del content["stages.2.blocks.0.pw1.bn.running_mean"]
    content["stages.1.blocks.0.large_kernel.lkb_origin.conv.bias"] = torch.zeros(12)
    content["transitions.1.0.conv.weight"] = torch.zeros(16, 13, 1, 1)
    problem = refused(save(tmp_path / "x.pth", content)).problem
    lines = problem.splitlines()
    assert lines[1:] == [
        "  missing 1: stages.2.blocks.0.pw1.bn.running_mean",
        "  unexpected 1: stages.1.blocks.0.large_kernel.lkb_origin.conv.bias",
        "  misshaped 1: transitions.1.0.conv.weight (16, 13, 1, 1), expected (16, 12, 1, 1)",
    ]
    assert "training form" in lines[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_tensor_that_does_not_fit_is_named_and_no_other(data) -> None:
    model = RepLKNet.empty(DEEP, "training")
    whole = {k: torch.empty(tuple(v.shape), device="meta") for k, v in model.state_dict().items()}
    names = sorted(k for k in whole if not k.endswith("num_batches_tracked"))
    lost = set(data.draw(st.lists(st.sampled_from(names), max_size=5)))
    reshaped = set(data.draw(st.lists(st.sampled_from(names), max_size=5))) - lost
    added = {f"extra.{n}" for n in data.draw(st.lists(st.sampled_from(names), max_size=3))}
    found = {k: v for k, v in whole.items() if k not in lost}
    found |= {k: torch.empty(*whole[k].shape, 1, device="meta") for k in reshaped}
    found |= {k: torch.empty(1, device="meta") for k in added}
    fit = checkpoint.check_fit(model, found)
    assert set(fit.missing) == lost
    assert set(fit.unexpected) == added
    assert {line.split(" ", 1)[0] for line in fit.misshaped} == reshaped
    assert fit.exact == (not (lost or reshaped or added))
    assert all(name in str(fit) for name in lost | added | reshaped)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_half_a_head_is_refused(leaf: str, trained, tmp_path: Path) -> None:
    content = {k: v for k, v in state(trained).items() if k != f"head.{leaf}"}
    assert f"missing 1: head.{leaf}" in refused(save(tmp_path / "x.pth", content)).problem


def test_a_lost_stage_is_not_a_smaller_network(trained, tmp_path: Path) -> None:
    content = {k: v for k, v in state(trained).items() if not k.startswith("stages.3.")}
    assert "transitions.2.0.conv.weight" in refused(save(tmp_path / "x.pth", content)).problem
    content = {k: v for k, v in state(trained).items() if not k.startswith("stages.1.")}
    assert "stage 1" in refused(save(tmp_path / "x.pth", content)).problem
    content = {k: v for k, v in state(trained).items() if not k.startswith("stages.2.blocks.0.")}
    assert "stages.2.blocks.0.prelkb_bn.weight" in refused(save(tmp_path / "x.pth", content)).problem


def test_forms_that_are_mixed_are_refused(trained, tmp_path: Path) -> None:
    merged = state(cast(fuse(trained, level="merge").model, torch.float32))
    folded = state(cast(fuse(trained).model, torch.float32))
    mixed = refused(save(tmp_path / "x.pth", state(trained) | merged)).problem
    assert "mixes the training form" in mixed
    half = {k: v for k, v in merged.items() if not k.startswith("stem.")}
    half |= {k: v for k, v in folded.items() if k.startswith("stem.")}
    problem = refused(save(tmp_path / "x.pth", half)).problem
    assert "stem.0.conv.bias" in problem
    assert "stem.0.bn.running_mean" in problem


# values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "value", "words"),
    [
        ("stages.0.blocks.0.large_kernel.lkb_origin.conv.weight", float("nan"), "NaN or infinite"),
        ("head.bias", float("inf"), "NaN or infinite"),
        ("norm.running_mean", float("-inf"), "NaN or infinite"),
        ("norm.running_var", float("nan"), "NaN or infinite"),
        ("norm.running_var", -1e-12, "negative variances"),
    ],
)
def test_impossible_values_are_refused_by_name(leaf: str, value: float, words: str, trained, tmp_path: Path) -> None:
    content = {k: v.clone() for k, v in state(trained).items()}
    content[leaf].view(-1)[-1] = value
    content["stem.2.bn.running_var"].view(-1)[0] = value
    problem = refused(save(tmp_path / "x.pth", content)).problem
    assert words in problem
    assert leaf in problem
    assert "stem.2.bn.running_var" in problem


def test_a_variance_of_zero_is_possible(trained, tmp_path: Path) -> None:
    content = {k: v.clone() for k, v in state(trained).items()}
    content["norm.running_var"][3] = 0
    assert load(save(tmp_path / "x.pth", content)).model.norm.running_var[3] == 0


def test_values_too_large_for_float32_are_refused(trained, tmp_path: Path) -> None:
    content = state(trained) | {"head.bias": trained.head.bias.double() * 1e300}
    assert "head.bias" in refused(save(tmp_path / "x.pth", content)).problem


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_weights_that_are_no_floats_are_refused_by_name(dtype: torch.dtype, trained, tmp_path: Path) -> None:
    content = state(trained) | {"head.weight": trained.head.weight.to(dtype)}
    problem = refused(save(tmp_path / "x.pth", content)).problem
    assert "not floating point" in problem
    assert problem.endswith("1 tensors: head.weight")


def test_eight_bit_floats_are_numbers_too(trained, tmp_path: Path) -> None:
    content = state(trained) | {"head.weight": trained.head.weight.to(torch.float8_e4m3fn)}
    loaded = load(save(tmp_path / "x.pth", content))
    assert torch.equal(loaded.model.head.weight, content["head.weight"].float())


# other networks ------------------------------------------------------------------------------------------------------

FOREIGN = {
    "UniRepLKNet": {"stages.0.0.dwconv.lk_origin.weight": (8, 1, 13, 13), "stages.0.0.pwconv1.1.weight": (32, 8)},
    "OverLoCK": {"blocks1.0.proj.1.lk_origin.weight": (8, 1, 13, 13), "blocks1.0.dwconv.weight": (8, 1, 3, 3)},
    "SLaK": {"stages.0.0.large_kernel.LoRA1.conv.weight": (8, 1, 51, 5), "stages.0.0.pwconv1.weight": (32, 8)},
    "ShiftWiseConv": {"stages.0.0.large_kernel.LoRAs.0.weight": (8, 1, 5, 5)},
    "RepVGG": {"stage1.0.rbr_dense.conv.weight": (8, 3, 3, 3), "stage1.0.rbr_1x1.conv.weight": (8, 3, 1, 1)},
    "timm": {"stages.0.0.conv_kxk.0.conv.weight": (8, 3, 3, 3)},
    "Swin": {
        "layers.0.blocks.0.attn.relative_position_bias_table": (169, 4),
        "layers.0.blocks.0.attn.qkv.weight": (24, 8),
    },
    "vision transformer": {"blocks.0.attn.qkv.weight": (24, 8), "blocks.0.mlp.fc1.weight": (32, 8)},
    "ConvNeXt": {"stages.0.0.pwconv1.weight": (32, 8), "stages.0.0.dwconv.weight": (8, 1, 7, 7)},
    "ResNet": {"conv1.weight": (8, 3, 7, 7), "layer1.0.conv1.weight": (8, 8, 1, 1), "fc.weight": (10, 8)},
}


@pytest.mark.parametrize("family", FOREIGN)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_another_network_is_refused_by_the_name_of_its_family(family: str, prefix: str, tmp_path: Path) -> None:
    content = {"state_dict": {prefix + k: torch.zeros(s) for k, s in FOREIGN[family].items()}}
    problem = refused(save(tmp_path / "x.pth", content)).problem
    assert "not a RepLKNet" in problem
    assert family in problem


def test_an_unknown_network_is_refused(tmp_path: Path) -> None:
    problem = refused(save(tmp_path / "x.pth", {"embedding.weight": torch.zeros(4, 4)})).problem
    assert "no tensor named stages.*" in problem


@pytest.mark.parametrize(
    ("twist", "words"),
    [
        (lambda k, v: v[..., :30, :30] if "lkb_origin.conv" in k else v, "common centre"),
        (lambda k, v: v[..., :4, :4] if "small_conv.conv" in k else v, "common centre"),
        (lambda k, v: v[..., :3, :3] if "lkb_origin.conv" in k else v, "common centre"),
        (lambda _, v: v[:0] if v.dim() else v, "stage 0"),
    ],
    ids=["even kernel", "even small kernel", "small larger than large", "no channels"],
)
def test_a_geometry_that_cannot_be_is_refused(twist: Callable, words: str, trained, tmp_path: Path) -> None:
    content = {k: twist(k, v).clone() for k, v in state(trained).items()}
    assert words in refused(save(tmp_path / "x.pth", content)).problem


def test_a_block_with_an_absurd_number_is_refused_at_once(trained, tmp_path: Path) -> None:
    content = state(trained) | {"stages.0.blocks.900000001.pw1.conv.weight": torch.zeros(32, 8, 1, 1)}
    assert "900000001" in refused(save(tmp_path / "x.pth", content)).problem


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_tensors_of_any_shape_are_taken_or_refused_and_nothing_else(data, tmp_path_factory) -> None:
    model = RepLKNet.empty(PLAIN_BACKBONE, "training")
    content = {k: torch.zeros(tuple(v.shape)) for k, v in model.state_dict().items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=6)):
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 13]), max_size=4))
        content[name] = torch.zeros(shape)
    for name in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=40)):
        content.pop(name, None)
    path = tmp_path_factory.getbasetemp() / "shapes.pth"
    try:
        load(save(path, content))
    except CheckpointError as exc:
        assert str(path) in exc.problem  # noqa: PT017  # either answer is right, any other exception is not


# damage, code and our own files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors", "ours"])
def test_a_truncated_checkpoint_is_refused(kind: str, trained, tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if kind in ("safetensors", "ours") else "x.pth")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(megengine(trained, bn_4d=False)))
    elif kind == "safetensors":
        save_file(state(trained), path)
    elif kind == "ours":
        weights.write(path, trained, header(trained))
    else:
        torch.save({"model": state(trained)}, path, _use_new_zipfile_serialization=kind == "zip")
    raw = path.read_bytes()
    load(path)
    for size in [0, 1, 7, 100, len(raw) // 3, len(raw) // 2, len(raw) - 200, len(raw) - 1]:
        path.write_bytes(raw[:size])
        refused(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"echo > '{self.path}'",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code_in_it_runs_nothing_and_leaves_nothing(
    kind: str, trained, in_empty_folder: Path
) -> None:
    path, trace = in_empty_folder / "x.pth", in_empty_folder / "it ran"
    content = {"model": state(trained), "args": networks.training_args(hook=Bomb(trace))}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": megengine(trained, bn_4d=False), "hook": Bomb(trace)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    found = refused(path)
    assert "system" in found.problem
    assert "state_dict" in found.remedy
    assert not trace.exists()


def header(model, **changes: object) -> Metadata:
    said = {"precision": "fp32", "source_sha256": "0" * 64, "source_name": "x.pth", "label": "RepLKNet-test"}
    shape = {"family": "replknet", "form": model.form, "geometry": model.describe()}
    return Metadata(**(shape | {"preprocessing": from_args(None, "")} | said | changes))


@pytest.mark.parametrize("form", ["training", "merged", "folded"])
def test_our_own_file_keeps_its_header_and_the_merged_branch_its_width(form: str, trained, tmp_path: Path) -> None:
    level = {"merged": "merge", "folded": "full"}
    model = cast(fuse(trained, level=level[form]).model, torch.float32) if form in level else trained
    path = tmp_path / "model.safetensors"
    weights.write(path, model, header(model))
    loaded = load(path)
    alike(loaded.model, model)
    assert isinstance(loaded, Loaded)
    assert loaded.metadata == header(model)
    assert (loaded.wrapper, loaded.form, loaded.label) == ("replk", form, "RepLKNet-test")
    assert loaded.model.geometry == networks.SMALL
    assert "no averaged weights" in refused(path, source="ema").problem
