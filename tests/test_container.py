"""A file becomes named tensors and nothing in it is run; whatever else it is, it is refused in words."""

import argparse
import copyreg
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from replk_deploy import container
from replk_deploy.errors import CheckpointError, Exit

FEW = settings(max_examples=150, deadline=None, derandomize=True)
KINDS = ("weights.pth", "legacy.pth", "weights.pkl", "weights.safetensors")


def weights() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(4, 3, 3, 3, generator=rng),
        "stem.half": torch.randn(5, generator=rng).half(),
        "stem.wide": torch.randn(2, 3, generator=rng).double(),
        "stem.turned": torch.randn(3, 5, generator=rng).t(),
        "stem.count": torch.tensor(7),
    }


def save(kind: str, path: Path, content: object) -> Path:
    """Write content as a file of a kind; pickles of MegEngine hold numpy arrays."""
    if kind == "weights.safetensors":
        save_file({k: v.contiguous() for k, v in content.items()}, path)
    elif kind == "weights.pkl":
        path.write_bytes(pickle.dumps(arrays(content), protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "weights.pth")
    return path


def arrays(content: object) -> object:
    if isinstance(content, torch.Tensor):
        return content.numpy()
    return {k: arrays(v) for k, v in content.items()} if isinstance(content, dict) else content


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def refused(path: Path) -> CheckpointError:
    """Read a file that must be refused: in words, with a remedy, naming the file, with exit code 2."""
    with pytest.raises(CheckpointError) as caught:
        container.read(path)
    assert caught.value.code == Exit.USAGE
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    assert "Traceback" not in caught.value.problem
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_back_names_types_shapes_and_values(kind: str, tmp_path: Path) -> None:
    contents = container.read(save(kind, tmp_path / kind, weights()))
    wanted = weights() if kind != "weights.safetensors" else dict(sorted(weights().items()))
    same(contents.tensors if kind != "weights.safetensors" else dict(sorted(contents.tensors.items())), wanted)
    assert (contents.wrapper, contents.beside, contents.args, contents.has_ema) == ("bare", (), None, False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_known_by_content_and_not_by_suffix(kind: str, tmp_path: Path) -> None:
    same(
        dict(sorted(container.read(save(kind, tmp_path / "weights.bin", weights())).tensors.items())), weights_sorted()
    )


def weights_sorted() -> dict[str, torch.Tensor]:
    return dict(sorted(weights().items()))


def test_a_safetensors_header_of_any_length_is_known_without_its_suffix(tmp_path: Path) -> None:
    """The first byte of the file is the low byte of that length, and 128 is also how a pickle begins."""
    seen = set()
    for length in range(1, 300, 4):
        path = tmp_path / "weights"
        save_file({"a": torch.ones(2), "b" * length: torch.zeros(1)}, path)
        seen.add(path.read_bytes()[0])
        assert set(container.read(path).tensors) == {"a", "b" * length}
    assert pickle.PROTO[0] in seen


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_arrays_pickled_by_old_and_new_numpy_are_read(protocol: int, core: bytes, tmp_path: Path) -> None:
    found = OrderedDict(arrays(weights()))
    found["stem.big end"] = np.arange(6, dtype=">f4").reshape(2, 3)
    found["stem.fortran"] = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    found["stem.scalar"] = np.float32(2.5)
    raw = pickle.dumps(found, protocol=protocol)
    # a short string of protocol 4 carries its length in the byte before it
    for name in (b"multiarray", b"numeric"):
        old, new = b"numpy._core." + name, core + b"." + name
        raw = raw.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new).replace(old, new)
    if protocol >= 4 and core == b"numpy.core":
        raw = _without_frames(raw)
    path = tmp_path / "weights.pkl"
    path.write_bytes(raw)
    tensors = container.read(path).tensors
    same({k: v for k, v in tensors.items() if k in weights()}, weights())
    grid = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    same(
        {k: v for k, v in tensors.items() if k not in weights()},
        {"stem.big end": grid, "stem.fortran": grid, "stem.scalar": torch.tensor(2.5)},
    )


def _without_frames(raw: bytes) -> bytes:
    """Drop the frame lengths of a short pickle, which edited names have made wrong."""
    out, at = raw[:2], 2
    assert raw[at : at + 1] == b"\x95"
    (length,) = struct.unpack("<Q", raw[at + 1 : at + 9])
    assert length + 64 > len(raw) - at - 9, "one frame only"
    return out + raw[at + 9 :]


# wrappers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weights.pth", "legacy.pth", "weights.pkl"])
@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_wrappers_are_opened_and_what_lies_beside_is_named(kind: str, key: str, tmp_path: Path) -> None:
    path = save(kind, tmp_path / "x", {"epoch": 3, key: weights(), "optimizer": {}})
    contents = container.read(path)
    same(contents.tensors, weights())
    assert (contents.wrapper, contents.beside) == (key, ("epoch", "optimizer"))


def test_wrappers_in_wrappers_and_prefixes_on_prefixes_are_removed(tmp_path: Path) -> None:
    named = {f"module._orig_mod.{k}": v for k, v in weights().items()}
    contents = container.read(save("weights.pth", tmp_path / "x", {"state_dict": {"model": named, "step": 1}}))
    same(contents.tensors, weights())
    assert contents.wrapper == "state_dict / model / module. / _orig_mod."
    assert contents.beside == ("step",)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_prefix_is_removed_only_when_every_name_has_it(prefix: str, tmp_path: Path) -> None:
    named = {f"{prefix}{k}": v for k, v in weights().items()}
    same(container.read(save("weights.pth", tmp_path / "x", named)).tensors, weights())
    some = {**named, "head.bias": torch.zeros(2)}
    same(container.read(save("weights.pth", tmp_path / "y", some)).tensors, some)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict"])
def test_averaged_weights_are_taken_when_asked_for_and_never_unasked(key: str, tmp_path: Path) -> None:
    averaged = {k: v * 2 for k, v in weights().items()}
    path = save("weights.pth", tmp_path / "x", {"model": weights(), key: averaged})
    raw, ema = container.read(path), container.read(path, source="ema")
    same(raw.tensors, weights())
    same(ema.tensors, averaged)
    assert (raw.wrapper, raw.beside, raw.has_ema) == ("model", (key,), True)
    assert (ema.wrapper, ema.beside, ema.has_ema) == (key, ("model",), True)


@pytest.mark.parametrize("content", [{"model": weights()}, weights()], ids=["wrapped", "bare"])
def test_averaged_weights_that_are_not_there_are_refused(content: dict, tmp_path: Path) -> None:
    path = save("weights.pth", tmp_path / "x", content)
    with pytest.raises(CheckpointError, match="no averaged weights") as caught:
        container.read(path, source="ema")
    assert "--weights ema" in caught.value.remedy


def test_a_file_of_averaged_weights_alone_is_refused_with_the_way_to_them(tmp_path: Path) -> None:
    found = refused(save("weights.pth", tmp_path / "x", {"model_ema": weights()}))
    assert "--weights ema" in found.remedy


@pytest.mark.parametrize("kind", ["weights.pth", "legacy.pth"])
def test_training_arguments_are_read(kind: str, tmp_path: Path) -> None:
    args = argparse.Namespace(model="x", input_size=64, crop_pct=None, betas=[0.9, 0.999])
    found = container.read(save(kind, tmp_path / "x", {"model": weights(), "args": args}))
    assert found.args == args
    assert found.beside == ("args",)


def test_arguments_of_another_type_are_left_alone(tmp_path: Path) -> None:
    path = save("weights.pth", tmp_path / "x", {"model": weights(), "args": {"input_size": 64}})
    assert container.read(path).args is None


# nothing is run ------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it runs a command that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"echo > '{self.path}'",)


@pytest.mark.parametrize("kind", ["weights.pth", "legacy.pth", "weights.pkl"])
@pytest.mark.parametrize("place", ["beside", "inside", "top"])
def test_code_in_a_file_is_named_and_not_run(kind: str, place: str, tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    bomb = Bomb(trace)
    content = {"beside": {"model": weights(), "args": bomb}, "inside": {**weights(), "x": bomb}, "top": bomb}[place]
    before = save(kind, tmp_path / kind, content).read_bytes()
    problem = refused(tmp_path / kind).problem
    assert f"{os.name}.system" in problem
    assert "nothing was run" in problem
    assert not trace.exists()
    assert [p.name for p in tmp_path.iterdir()] == [kind]
    assert (tmp_path / kind).read_bytes() == before
    pickle.loads(pickle.dumps(bomb))  # noqa: S301  # our own
    assert trace.exists(), "the bomb is a dud, so this test shows nothing"


@pytest.mark.parametrize("kind", ["weights.pth", "legacy.pth"])
def test_code_that_the_first_look_misses_is_still_not_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda _: [])
    trace = tmp_path / "it ran"
    problem = refused(save(kind, tmp_path / kind, {"model": weights(), "hook": Bomb(trace)})).problem
    assert f"{os.name}.system" in problem
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["weights.pth", "legacy.pth"])
def test_a_pickled_module_is_refused_by_the_name_of_its_class(kind: str, tmp_path: Path) -> None:
    problem = refused(save(kind, tmp_path / "x.pth", {"model": nn.Linear(2, 2)})).problem
    assert "torch.nn.modules.linear.Linear" in problem


@pytest.mark.parametrize("thing", [Path("/out"), nn.Linear, np.random.default_rng], ids=lambda t: str(t)[:12])
def test_anything_but_a_namespace_is_refused(thing: object, tmp_path: Path) -> None:
    path = save("weights.pth", tmp_path / "x.pth", {"model": weights(), "args": argparse.Namespace(output=thing)})
    assert "refused" in refused(path).problem


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval",
        b"builtins\ngetattr",
        b"numpy\nload",
        b"numpy\nfromfile",
        b"numpy.core.multiarray\nfromfile",
        b"torch\nload",
        b"argparse\nNamespace",
        b"collections\nnamedtuple",
        b"posix\nsystem",
        b"functools\npartial",
    ],
)
def test_a_plain_pickle_knows_arrays_and_nothing_else(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02c" + name + b"\n.")
    assert name.decode().replace("\n", ".") in refused(path).problem


def test_an_array_cannot_claim_another_memory_layout(tmp_path: Path) -> None:
    """Numpy's own unpickling believes the flags of a dtype: bytes of the file would be taken for addresses."""

    class Claim:
        def __init__(self, dtype: object, data: object) -> None:
            self.dtype, self.data = dtype, data

        def __reduce__(self) -> tuple:
            start = np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b")
            return (*start, (1, (2,), self.dtype, False, self.data))

    class Objects:
        def __reduce__(self) -> tuple:
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

    class Floats:
        def __reduce__(self) -> tuple:
            return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)

    data = np.array([1.5, -2.5]).tobytes()
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"a": Claim(Objects(), data)}))
    assert "object" in refused(path).problem
    path.write_bytes(pickle.dumps({"a": Claim(Floats(), data)}))
    assert container.read(path).tensors["a"].tolist() == [1.5, -2.5]
    path.write_bytes(pickle.dumps({"a": Claim(Floats(), data[:-1])}))
    refused(path)


def test_a_pickle_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD on a class would set its attributes, for every later file too."""
    path = tmp_path / "weights.pkl"
    for name in (b"numpy\ndtype", b"numpy\nndarray", b"_codecs\nencode", b"collections\nOrderedDict"):
        for state in (b"(dVx\nI1\ns", b"(N(dVx\nI1\nst"):
            path.write_bytes(b"\x80\x02c" + name + b"\n" + state + b"b.")
            refused(path)
    assert not any(hasattr(stand_in, "x") for stand_in in container.STAND_INS.values())
    same(container.read(save("weights.pkl", path, weights())).tensors, weights())


def test_the_registry_of_copyreg_is_out_of_reach(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        path = tmp_path / "weights.pkl"
        path.write_bytes(b"\x80\x02\x82\xf0.")
        assert "os.system" in refused(path).problem
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    """Written by hand: torch.jit is deprecated and warns."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"model/{name}", b"")
    found = refused(path)
    assert "TorchScript" in found.problem
    assert "state_dict" in found.remedy


# not a checkpoint ----------------------------------------------------------------------------------------------------


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros(3))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


WRONG = {
    "missing": (lambda _: None, "not a file"),
    "directory": (lambda p: p.mkdir(), "not a file"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "text": (lambda p: p.write_text("weights: none\n"), "not a checkpoint"),
    "one byte": (lambda p: p.write_bytes(b"\x80"), "not a checkpoint"),
    "HTML": (lambda p: p.write_text("<!doctype html><title>404</title>"), "not a checkpoint"),
    "git lfs pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "not a checkpoint"),
    "zeros": (lambda p: p.write_bytes(bytes(4096)), "not a checkpoint"),
    "npz": (_npz, "not a torch checkpoint"),
    "zip": (_zip, "not a torch checkpoint"),
    "empty zip": (lambda p: p.write_bytes(b"PK\5\6" + bytes(18)), "not a torch checkpoint"),
    "PK and nothing": (lambda p: p.write_bytes(b"PK\3\4"), "cut short"),
    "list": (lambda p: torch.save([torch.ones(2)], p), "holds a list"),
    "tensor": (lambda p: torch.save(torch.ones(2), p), "holds a Tensor"),
    "number": (lambda p: p.write_bytes(pickle.dumps(3)), "holds a int"),
    "array": (lambda p: p.write_bytes(pickle.dumps(np.ones(3))), "not named tensors"),
    "text array": (lambda p: p.write_bytes(pickle.dumps({"a": np.array(["x"])})), "not a checkpoint"),
    "empty dictionary": (lambda p: torch.save({}, p), "nothing"),
    "empty model": (lambda p: torch.save({"model": {}}, p), "under model: nothing"),
    "unnamed values": (lambda p: torch.save({**weights(), "lr": 0.1, "why": "x"}, p), "lr, why"),
    "nested too deep": (lambda p: torch.save({"model": {"weights": weights()}}, p), "under model: weights"),
    "sparse": (lambda p: torch.save({"stem.w": torch.eye(2).to_sparse()}, p), "stem.w"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_a_checkpoint_is_refused_in_words(what: str, tmp_path: Path) -> None:
    make, words = WRONG[what]
    path = tmp_path / "weights.pth"
    make(path)
    assert words in refused(path).problem


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pth"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_misnamed_file_is_read_or_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = save(kind, tmp_path / f"x{suffix}", weights())
    if suffix == ".safetensors" and kind != "weights.safetensors":
        refused(path)
    else:
        assert container.read(path).tensors.keys() == weights().keys()


@pytest.mark.parametrize("kind", ["weights.pth", "legacy.pth", "weights.pkl"])
@pytest.mark.parametrize("key", ["model", "other"])
def test_a_file_that_holds_itself_is_refused(kind: str, key: str, tmp_path: Path) -> None:
    ring: dict = {}
    ring[key] = ring
    path = tmp_path / "x.pth"
    if kind == "weights.pkl":
        path.write_bytes(pickle.dumps(ring))
    else:
        torch.save(ring, path, _use_new_zipfile_serialization=kind == "weights.pth")
    refused(path)


# damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return one file of each kind, as bytes."""
    folder = tmp_path_factory.mktemp("whole")
    content = {"model": weights(), "args": argparse.Namespace(input_size=64), "epoch": 3}
    plain = ("weights.pkl", "weights.safetensors")
    return {k: save(k, folder / k, weights() if k in plain else content).read_bytes() for k in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_refused(kind: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    path, raw = tmp_path / kind, whole[kind]
    path.write_bytes(raw)
    assert container.read(path).tensors.keys() == weights().keys()
    for size in sorted({*range(0, len(raw), 7), *range(24), *range(len(raw) - 24, len(raw))}):
        path.write_bytes(raw[:size])
        found = refused(path)
        if size and kind != "legacy.pth":  # a name cut short in there is a name that is not allowed
            assert any(w in found.problem for w in ("cut short", "not a checkpoint", "not a whole")), size


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused_and_nothing_else(kind: str, whole, tmp_path_factory, data) -> None:
    raw = bytearray(whole[kind])
    near_an_end = st.integers(0, 400) | st.integers(len(raw) - 700, len(raw) - 1) | st.integers(0, len(raw) - 1)
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 8]))):
        raw[data.draw(near_an_end)] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged-{kind}"
    path.write_bytes(raw)
    try:
        found = container.read(path)
    except CheckpointError as exc:
        assert exc.remedy  # noqa: PT017  # either answer is right, any other exception is not
    else:
        assert all(isinstance(t, torch.Tensor) for t in found.tensors.values())


@FEW
@given(
    start=st.sampled_from([b"", b"PK\3\4", b"\x80\2", b"\x80\4\x95", bytes([8]) + bytes(7) + b"{", b"\x80\2\x8a\nl"]),
    rest=st.binary(max_size=200),
    suffix=st.sampled_from([".pth", ".pkl", ".safetensors"]),
)
def test_garbage_is_refused(start: bytes, rest: bytes, suffix: str, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / f"garbage{suffix}"
    path.write_bytes(start + rest)
    refused(path)
