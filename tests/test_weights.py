"""Our own weights file gives back the network to the bit, and notices every change."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from replk_deploy import weights
from replk_deploy.errors import CheckpointError, Exit, IntegrityError
from replk_deploy.fuse import fuse
from replk_deploy.metadata import Metadata, Verdict
from replk_deploy.preprocess import from_args
from replk_deploy.proof import cast
from tests import networks


def said(model, **changes: object) -> Metadata:
    fields = {
        "family": "replknet",
        "form": model.form,
        "geometry": model.describe(),
        "label": "RepLKNet-test",
        "precision": "fp32",
        "preprocessing": from_args(networks.training_args(), ""),
        "source_sha256": "0" * 64,
        "source_name": "checkpoint-best.pth",
    }
    metadata = Metadata(**(fields | changes))
    content = weights.judged_hash(model, metadata)
    verdict = Verdict(state="pass", content=content, reference="0" * 64, worst=0.25, why="as near as can be")
    return dataclasses.replace(metadata, verdict=verdict)


@pytest.fixture(scope="module")
def folded(trained):
    return cast(fuse(trained).model, torch.float32)


@pytest.fixture
def file(folded, tmp_path: Path) -> Path:
    path = tmp_path / "fused.safetensors"
    weights.write(path, folded, said(folded))
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_header_alone_tells_the_network(trained, tmp_path: Path, precision: str) -> None:
    model = cast(fuse(trained).model, precision)
    path = tmp_path / "w.safetensors"
    weights.write(path, model, said(model, precision=precision))
    whole = path.read_bytes()
    path.write_bytes(whole[:-64] + bytes(64))
    empty, metadata = weights.described(path)
    assert metadata == weights.header(path)
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    assert [(n, t.shape, t.dtype) for n, t in empty.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in model.state_dict().items()
    ]
    with pytest.raises(IntegrityError):
        weights.read(path)


def rewrite(path: Path, tensors: dict | None = None, **header: str | None) -> Path:
    """Change tensors or header fields of a file and leave the rest as it is."""
    with safe_open(path, framework="pt") as file:
        found = dict(file.metadata())
    found |= {f"replk.{k}": v for k, v in header.items() if v is not None}
    for name in (k for k, v in header.items() if v is None):
        del found[f"replk.{name}"]
    save_file(load_file(path) | (tensors or {}), path, metadata=found)
    return path


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        weights.read(path)
    assert caught.value.code == Exit.USAGE
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["small", "like XL", "backbone"])
@pytest.mark.parametrize("level", [None, "merge", "full"])
def test_every_tensor_and_the_header_come_back_to_the_bit(precision, dtype, name, level, tmp_path: Path) -> None:
    model = networks.trained(networks.GEOMETRIES[name])
    model = cast(fuse(model, level=level).model if level else model, dtype)
    header = said(model, precision=precision)
    path = tmp_path / "x.safetensors"
    weights.write(path, model, header)
    back, metadata = weights.read(path)
    assert metadata == header == weights.header(path)
    assert metadata.verdict.worst == 0.25
    assert back.geometry == model.geometry
    assert (back.form, back.training) == (model.form, False)
    assert back.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert back.state_dict()[key].dtype == tensor.dtype
        assert torch.equal(back.state_dict()[key], tensor)
    assert weights.content_hash(back) == weights.content_hash(model)
    assert metadata.verdict.content == weights.judged_hash(back, metadata)


def test_turned_weights_are_written_in_order(folded, tmp_path: Path) -> None:
    turned = cast(folded, torch.float32).to(memory_format=torch.channels_last)
    assert not turned.get_parameter("stem.2.conv.weight").is_contiguous() or turned.head.weight.t().t().is_contiguous()
    weights.write(tmp_path / "x.safetensors", turned, said(folded))
    back, _ = weights.read(tmp_path / "x.safetensors")
    assert weights.content_hash(back) == weights.content_hash(folded) == weights.content_hash(turned)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_hash_knows_every_bit_of_every_tensor(folded, data) -> None:
    model = cast(folded, torch.float32)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    before = weights.content_hash(model)
    tensor = model.get_parameter(data.draw(st.sampled_from(sorted(dict(model.named_parameters())))))
    bits = tensor.data.view(-1).view(torch.int32)
    bits[data.draw(st.integers(0, bits.numel() - 1))] ^= 1 << data.draw(st.integers(0, 30))
    assert weights.content_hash(model) != before


def test_the_hash_knows_names_shapes_and_types(folded) -> None:
    half = cast(folded, torch.float16)
    assert len({weights.content_hash(m) for m in (folded, half, cast(half, torch.float32))}) == 3
    swapped = cast(folded, torch.float32)
    pair = ("stem.1.conv.bias", "stem.2.conv.bias")
    first, second = (swapped.get_parameter(n).data.clone() for n in pair)
    assert not torch.equal(first, second)
    swapped.get_parameter(pair[0]).data, swapped.get_parameter(pair[1]).data = second, first
    assert weights.content_hash(swapped) != weights.content_hash(folded)


def test_the_hash_tells_equal_bytes_apart_by_name_shape_and_type() -> None:
    class Holder:
        def __init__(self, **tensors: torch.Tensor) -> None:
            self.tensors = tensors

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.tensors

    grid = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    kinds = [
        Holder(a=grid),
        Holder(b=grid),
        Holder(a=grid.reshape(3, 2)),
        Holder(a=grid.view(torch.int32)),
        Holder(a=grid[:1], b=grid[1:]),
    ]
    assert len({weights.content_hash(k) for k in kinds}) == len(kinds)
    assert weights.content_hash(Holder(a=grid, b=grid + 1)) == weights.content_hash(Holder(b=grid + 1, a=grid))


def test_an_edited_tensor_is_not_the_content_its_verdict_speaks_of(file: Path, folded) -> None:
    metadata = weights.read(file)[1]
    assert metadata.verdict.content == weights.judged_hash(folded, metadata)
    rewrite(file, {"head.bias": folded.head.bias + 1e-3})
    with pytest.raises(IntegrityError, match="not those its verdict speaks of"):
        weights.read(file)


@pytest.mark.parametrize("field", ["preprocessing", "label", "source_sha256", "source_name", "selected", "version"])
def test_an_edited_header_is_not_the_content_its_verdict_speaks_of(file: Path, field: str) -> None:
    with safe_open(file, framework="pt") as opened:
        before = opened.metadata()[f"replk.{field}"]
    edited = {"preprocessing": before.replace("0.485", "0.5"), "source_sha256": "1" * 64}.get(field, f"{before}1")
    rewrite(file, **{field: edited})
    with pytest.raises(IntegrityError, match="not those its verdict speaks of"):
        weights.read(file)


def test_a_file_of_others_has_no_header_and_is_refused(folded, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file(dict(folded.state_dict()), path, metadata=metadata)
        assert weights.header(path) is None
        assert "not written by replk" in refused(path).problem


def test_tensors_that_do_not_fit_their_header_are_refused(file: Path) -> None:
    whole = load_file(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    for name, changed in {
        "lost": {k: v for k, v in whole.items() if k != "head.bias"},
        "added": whole | {"extra": torch.ones(1)},
        "reshaped": whole | {"head.bias": torch.ones(11)},
        "renamed": {k.replace("lkb_reparam", "lkb_origin"): v for k, v in whole.items()},
    }.items():
        path = file.with_name(f"{name}.safetensors")
        save_file(changed, path, metadata=header)
        assert "do not fit its own header" in refused(path).problem


def test_another_form_or_geometry_in_the_header_is_refused(file: Path) -> None:
    geometry = json.loads(networks.trained().describe()) | {"classes": 11}
    refused(rewrite(file, geometry=json.dumps(geometry)))
    refused(rewrite(file, geometry=networks.trained().describe(), form="training"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_tensors_do_not_have_is_refused(precision: str, file: Path) -> None:
    problem = refused(rewrite(file, precision=precision)).problem
    assert precision in problem
    assert "float32" in problem


def test_tensors_of_two_precisions_are_refused(file: Path, folded) -> None:
    refused(rewrite(file, {"head.bias": folded.head.bias.half()}))


@pytest.mark.parametrize(
    "damage",
    [
        {"geometry": "{"},
        {"geometry": "{}"},
        {"geometry": "[]"},
        {"geometry": "null"},
        {"geometry": '{"channels": 3}'},
        {"geometry": None},
        {"form": "melted"},
        {"precision": "fp8"},
        {"family": "resnet"},
        {"preprocessing": "{"},
        {"preprocessing": "[]"},
        {"preprocessing": None},
        {"verdict": "pass"},
        {"verdict": "[1]"},
        {"source_sha256": None},
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(damage: dict, file: Path) -> None:
    refused(rewrite(file, **damage))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_geometry_with_any_odd_field_is_refused(data, folded, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.safetensors"
    geometry = json.loads(folded.describe())
    field = data.draw(st.sampled_from(sorted(set(geometry) - {"classes", "small", "out_indices"})))
    odd = st.none() | st.integers(-3, 40) | st.text(max_size=3) | st.lists(st.integers(-2, 33), max_size=5)
    changed = geometry | {field: data.draw(odd)}
    if changed == geometry:
        return
    weights.write(path, folded, said(folded, geometry=json.dumps(changed)))
    refused(path)


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    raw = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 500, len(raw) // 2, len(raw) - 4, len(raw) - 1]:
        file.write_bytes(raw[:size])
        assert "not a whole safetensors file" in refused(file).problem
    file.unlink()
    refused(file)
