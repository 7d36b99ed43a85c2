"""Where the time goes, with a backend whose times are known; the real ones are held to their names and sums."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from replk_deploy import backends, machine, profile, records, render, sites, weights
from replk_deploy.backends.base import Array, Backend, LayerTime, TensorSpec
from replk_deploy.batch import DYNAMIC
from replk_deploy.errors import ContractError, ReplkError, UnavailableError
from replk_deploy.export import export
from replk_deploy.fuse import fuse
from replk_deploy.metadata import Metadata
from replk_deploy.models.replknet import RepLKNet
from replk_deploy.preprocess import HALF, Preprocessing
from replk_deploy.profile import Profile
from replk_deploy.proof import cast
from replk_deploy.roofline import Roofline
from replk_deploy.sites import Site
from tests import networks

IMAGES = np.zeros((2, 3, 8, 8), np.float32)
BEST = Roofline(
    device="cpu", precision="fp32", computes="float32", threads=1,
    copied_bytes=10**9, copy_s=(1.0,), flop=2 * 10**9, product_s=(1.0,),
)  # fmt: skip  # a microsecond a kB, a microsecond 1000 multiply-adds


def site(name: str, *, large: bool = False, macs: int = 0, inside: int = 0, elements: int = 0) -> Site:
    kernel = (31, 31) if large else (1, 1)
    return Site(
        name=name, channels=8, kernel=kernel, map=(8, 8), depthwise=large,
        macs=macs, inside_macs=inside, elements=elements,
    )  # fmt: skip


SITES = {
    "a": site("a", macs=2_000_000, inside=2_000_000, elements=1000),
    "big": site("big", large=True, macs=9_000_000, inside=3_000_000, elements=1000),
    "head": site("head", macs=1000, inside=1000, elements=1_000_000),
}
TIMES = {"a": 10.0, "big": 60.0, "relu": 5.0, "head": 20.0}


class Fake(Backend):
    """Lasts 100 ms when nobody watches, on a clock of its own, and tells the layers that it is given."""

    name: ClassVar[str] = "fake"
    takes = "onnx"
    precisions = frozenset({"fp32"})
    outputs = ("logits",)
    precision = "fp32"
    input = TensorSpec(name="images", dtype="float32", shape=(None, 3, 8, 8))

    def __init__(
        self, layers: Mapping[str, Sequence[float] | float], lasts: Callable[[int], float], gpu: object
    ) -> None:
        self.now, self.runs, self.lasts, self.gpu, self.layers, self.facts = 0, 0, lasts, gpu, layers, {"threads": "1"}
        self.device = "cpu" if gpu is None else "cuda"

    @classmethod
    def probe(cls) -> Mapping[str, str]:
        return {}

    def _run(self, images: Array) -> Mapping[str, Array]:
        raise NotImplementedError

    def prepare(self, images: Array) -> "Fake":
        self.check(images)
        return self

    def enqueue(self) -> None:
        self.now += int(self.lasts(self.runs) * 5e5)

    def wait(self) -> None:
        self.now += int(self.lasts(self.runs) * 5e5)
        self.runs += 1

    def device_ms(self) -> float | None:
        return self.gpu

    def layer_times(self, images: Array, *, repeats: int) -> tuple[LayerTime, ...]:
        del images
        return tuple(
            LayerTime(
                name=name,
                kind=name.partition("/")[2] or "Op",
                samples_ms=tuple(ms) if isinstance(ms, tuple) else (ms,) * repeats,
            )
            for name, ms in self.layers.items()
        )

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_real_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "environment", lambda: {"cpu": "a fake"})


def made(
    layers: Mapping[str, Sequence[float] | float] = TIMES,
    *,
    lasts: Callable[[int], float] = lambda _run: 100.0,
    known: Mapping[str, Site] = SITES,
    roofline: Roofline = BEST,
    gpu: float | None = None,
    **kwargs: object,
) -> Profile:
    fake = Fake(layers, lasts, gpu)
    options = {"repeats": 7} | kwargs
    return profile.profile(fake, IMAGES, sites=known, roofline=roofline, clock=lambda: fake.now, **options)


def test_layers_and_the_rest_add_up_to_the_whole() -> None:
    found = made()
    assert (found.whole_ms.value, found.layers_ms, found.unattributed_ms) == (100.0, 95.0, 5.0)
    assert [(layer.name, layer.ms.value, layer.share) for layer in found.layers] == [
        ("a", 10.0, 0.1), ("big", 60.0, 0.6), ("relu", 5.0, 0.05), ("head", 20.0, 0.2),
    ]  # fmt: skip
    assert sum(layer.share for layer in found.layers) + found.unattributed_ms / 100 == pytest.approx(1)
    assert found.doubts == ()
    assert (found.clock, found.shape, found.backend, found.device) == ("host", (2, 3, 8, 8), "fake", "cpu")


def test_each_layer_is_laid_beside_what_the_device_could_do() -> None:
    a, big, relu, head = made().layers
    assert (a.attainable_ms, big.attainable_ms, head.attainable_ms) == (2.0, 3.0, 4.0)  # head moves 4 MB
    assert (a.ratio, big.ratio, head.ratio) == (5.0, 20.0, 5.0)
    assert (big.macs, big.inside_macs, big.moved_bytes, big.large) == (9_000_000, 3_000_000, 4000, True)
    assert (relu.sites, relu.attainable_ms, relu.moved_bytes, relu.ratio, relu.large) == ((), None, None, None, False)


def test_half_precision_moves_half_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "precision", "fp16")
    roofline = Roofline(**{f: getattr(BEST, f) for f in Roofline.__slots__} | {"precision": "fp16"})
    assert made(roofline=roofline).layers[3].moved_bytes == 2_000_000


def test_the_whole_is_timed_unwatched_before_and_after() -> None:
    found = made(lasts=lambda run: 100.0 if run < 10 else 120.0)
    assert (found.before_ms, found.after_ms) == ((100.0,) * 7, (120.0,) * 7)
    assert found.whole_ms.value == 110.0
    assert any("100 ms before and 120 ms after" in doubt for doubt in found.doubts)


def test_first_inferences_warm_up() -> None:
    found = made(lasts=lambda run: 100.0 if run % 10 >= profile.WARM_UPS else 999.0)
    assert {*found.before_ms, *found.after_ms} == {100.0}


def test_the_gpus_own_clock_is_taken_where_there_is_one() -> None:
    roofline = Roofline(**{f: getattr(BEST, f) for f in Roofline.__slots__} | {"device": "cuda"})
    found = made(gpu=96.0, roofline=roofline)
    assert (found.clock, found.whole_ms.value, found.unattributed_ms) == ("device", 96.0, 1.0)


def test_no_share_is_above_a_whole_though_watching_slows_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    found = made({"a": 30.0, "big": 150.0, "head": 120.0})
    assert (found.unattributed_ms, found.large_share) == (-200.0, 0.5)
    assert [layer.share for layer in found.layers] == pytest.approx([0.1, 0.5, 0.4])
    assert found.sentence.startswith("large depthwise kernels: 150 of 300 ms, 50%")
    assert found.unstable
    render.profile(found)
    shown = capsys.readouterr().out
    assert "all layers, watched" in shown
    assert "in no layer" not in shown


@pytest.mark.parametrize(
    ("layers", "lasts", "unstable"),
    [
        (TIMES, lambda _run: 100.0, False),
        ({"big": 149.0}, lambda _run: 100.0, False),
        ({"big": 151.0}, lambda _run: 100.0, True),
        (TIMES, lambda run: 100.0 if run < 10 else 120.0, True),
        ({"a": (60.0, 20.0, 20.0) * 2, "big": (20.0, 60.0, 20.0) * 2, "head": (20.0, 20.0, 60.0) * 2}, None, True),
    ],
)
def test_numbers_that_show_the_machine_are_called_unstable(
    layers: Mapping[str, Sequence[float] | float], lasts: Callable[[int], float] | None, *, unstable: bool
) -> None:
    assert made(layers, lasts=lasts or (lambda _run: 100.0), repeats=6).unstable == unstable


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"big": 120.0}, "add up to 120% of the whole"),
        ({"big": 106.0}, "add up to 106% of the whole"),
        ({"big": 80.0}, "20% of the whole is in no layer"),
        ({"big": 96.0, "a": 0.0}, None),
        ({"big": 104.0}, None),
    ],
)
def test_a_sum_that_does_not_close_is_a_doubt(times: Mapping[str, float], words: str | None) -> None:
    doubts = made(times).doubts
    assert (len(doubts), words in doubts[0] if doubts else None) == ((1, True) if words else (0, None))


def test_interruptions_that_medians_hide_are_a_doubt() -> None:
    def hit(turn: int) -> tuple[float, ...]:
        return tuple(60.0 if run % 3 == turn else 20.0 for run in range(6))

    found = made({"a": hit(0), "big": hit(1), "head": hit(2)}, repeats=6)
    assert (found.layers_ms, found.watched_ms.value) == (60.0, 100.0)
    assert [doubt.partition(":")[0] for doubt in found.doubts] == [
        "the layers of one inference take 100 ms, their medians add up to 60"
    ]


def test_medians_have_intervals_and_outliers_do_not_move_them() -> None:
    found = made({"big": (50.0, 51.0, 52.0, 53.0, 54.0, 55.0, 500.0)})
    assert (found.layers[0].ms.value, found.layers[0].ms.interval) == (53.0, (50.0, 500.0))
    assert found.layers[0].samples_ms[-1] == 500.0


def test_what_belongs_to_one_module_is_one_row_and_counts_once() -> None:
    found = made(
        {"big/Transpose": 7.0, "big/Conv": 50.0, "a/MatMul + head/Add": 10.0, "head/MatMul": 20.0, "x/Relu": 1.0}
    )
    big, both, head, relu = found.layers
    assert (big.name, big.kind, big.ms.value, big.macs) == ("big", "Transpose + Conv", 57.0, 9_000_000)
    assert (both.name, [s.name for s in both.sites]) == ("a + head", ["a", "head"])
    assert (head.name, head.sites, head.ms.value) == ("head", (), 20.0)
    assert relu.name == "x/Relu"
    assert sum(layer.macs for layer in found.layers) == sum(s.macs for s in SITES.values())
    assert found.lost == ()
    assert found.large_ms == 57.0


def test_large_kernels_that_no_layer_names_are_a_doubt_and_not_a_small_share() -> None:
    found = made({"a": 10.0, "everything/Else": 88.0})
    assert {s.name for s in found.lost} == {"big", "head"}
    assert found.large_share == 0
    assert any("1 large kernels are in no layer that fake names, as big" in doubt for doubt in found.doubts)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            {"big": 60.0, "a/Conv": 38.0},
            "60 of 100 ms, 60%, 20x what this device could do: their form decides; compare runtimes",
        ),
        (
            {"big": 6.0, "a/Conv": 90.0},
            "6 of 100 ms, 6%, 2x what this device could do: the rest decides; most is Conv, 90%",
        ),
        ({"big/Conv": 25.0, "a/Gemm": 15.0, "head/Mul": 9.0}, "the rest decides; most is Gemm, 15%"),
        (
            {"a/Conv": 90.0, "head/Gemm": 8.0},
            "it is not known which layers are large depthwise kernels; most is Conv, 90%",
        ),
    ],
)
def test_the_first_line_says_the_share_of_the_large_kernels_and_what_follows(
    layers: Mapping[str, float], words: str
) -> None:
    assert words in made(layers).sentence


def test_a_network_without_large_kernels_is_told_from_one_that_nobody_knows() -> None:
    small = {name: s for name, s in SITES.items() if not s.large}
    assert made({"a/Conv": 90.0}, known=small).sentence == "no large depthwise kernel; most is Conv, 90%"
    assert made({"a/Conv": 90.0}, known={}).sentence.startswith("it is not known")
    assert made({"everything": 98.0}, known=small).sentence.startswith("it is not known")


def test_large_kernels_near_the_limit_are_no_advice_to_rewrite_them() -> None:
    found = made({"big": 60.0, "a/Conv": 38.0}, known=SITES | {"big": site("big", large=True, inside=30_000_000)})
    assert found.large_ratio == 2.0
    assert "little is left in them" in found.sentence


def test_what_cannot_be_profiled_is_refused() -> None:
    with pytest.raises(ReplkError, match="0 repetitions"):
        made(repeats=0)
    with pytest.raises(ReplkError, match="takes float32 images"):
        profile.profile(Fake(TIMES, lambda _: 1.0, None), IMAGES[:, :2], sites=SITES, roofline=BEST)
    with pytest.raises(ContractError, match="roofline of cpu fp32"):
        made(gpu=1.0)
    with pytest.raises(ContractError, match="big has 2 times, asked for 7"):
        made({"big": (1.0, 2.0)})
    with pytest.raises(ContractError, match="told none"):
        made({})


def test_progress_hears_of_the_three_parts() -> None:
    heard: list[tuple[str, int, int | None]] = []
    made(progress=lambda *said: heard.append(said))
    assert heard == [("profile", i, 3) for i in (1, 2, 3)]


def test_the_record_holds_every_sample_and_what_follows() -> None:
    record = json.loads(records.to_json(made()))
    assert (record["schema"], record["environment"]) == ("replk.profile/1", {"cpu": "a fake"})
    assert (record["large_share"], record["unattributed_ms"], record["large_ratio"]) == (0.6, 5.0, 20.0)
    layer = record["layers"][1]
    assert (layer["share"], layer["ratio"], layer["macs"], len(layer["samples_ms"])) == (0.6, 20.0, 9_000_000, 7)
    assert layer["sites"][0]["large"] is True
    assert "whole_ms" not in layer
    assert record["roofline"]["copy_gbps"] == 1.0
    assert record["sentence"].startswith("large depthwise kernels: 60 of 100 ms")


@pytest.fixture(scope="module")
def folded() -> RepLKNet:
    return cast(fuse(networks.trained()).model, "fp32")


def opened(name: str, network: RepLKNet, folder: Path) -> Backend:
    kind = backends.find(name)
    if kind.takes == "onnx":
        export(network, folder / "m.onnx", precision="fp32", size=(64, 64), batch=DYNAMIC)
        return kind(folder / "m.onnx")
    rules = Preprocessing(size=(64, 64), mean=HALF[0], std=HALF[1], resize="crop", crop_pct=0.875, said_by="default")
    said = Metadata(
        family="replknet", form="folded", geometry=network.describe(), label="small", precision="fp32",
        preprocessing=rules, source_sha256="0" * 64, source_name="a test",
    )  # fmt: skip
    weights.write(folder / "w.safetensors", network, said)
    return kind(folder / "w.safetensors")


@pytest.mark.parametrize("name", ["torch", "ort-cpu"])
def test_a_real_runtime_names_every_kernel_of_the_network(name: str, folded: RepLKNet, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)
    known = sites.of_network(folded, batch=2, size=(64, 64))
    with opened(name, folded, tmp_path) as backend:
        found = profile.profile(backend, images, sites=known, roofline=BEST, repeats=6)
    assert found.lost == ()
    large = [layer for layer in found.layers if layer.large]
    assert [layer.name for layer in large] == [n for n, s in known.items() if s.large]
    assert all(len(layer.samples_ms) == 6 and layer.ms.value > 0 for layer in large)
    assert sum(layer.macs for layer in found.layers) == sum(s.macs for s in known.values())
    assert found.layers_ms + found.unattributed_ms == pytest.approx(found.whole_ms.value)
    assert found.facts == backend.facts


def test_a_foreign_file_is_profiled_by_its_graph(folded: RepLKNet, tmp_path: Path) -> None:
    images = np.zeros((1, 3, 64, 64), np.float32)
    with opened("ort-cpu", folded, tmp_path) as backend:
        known = sites.of_file(tmp_path / "m.onnx", images.shape)
        found = profile.profile(backend, images, sites=known, roofline=BEST, repeats=3)
    assert found.lost == ()
    assert [s.kernel for layer in found.layers for s in layer.sites if s.large] == [
        s.kernel for s in known.values() if s.large
    ]


def test_a_runtime_that_tells_nothing_says_which_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "layer_times", Backend.layer_times)
    with pytest.raises(UnavailableError, match="fake does not tell its layers apart"):
        made()
