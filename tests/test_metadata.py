"""What a file says of itself survives the way through text, and what is damaged is not believed."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replk_deploy.metadata import Metadata, Verdict
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.preprocess import Preprocessing

GEOMETRY = json.dumps(dataclasses.asdict(VARIANTS["RepLKNet-31B"]), sort_keys=True)
texts = st.text(max_size=20)
lines = texts.filter(str.isprintable)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
shares = st.none() | st.floats(0, 1e9, allow_nan=False)
numbers = st.floats(0.01, 1, allow_nan=False)
thirds = st.tuples(numbers, numbers, numbers)
sides = st.integers(1, 4096)
rules = st.builds(
    Preprocessing,
    size=st.tuples(sides, sides),
    mean=thirds,
    std=thirds,
    resize=st.sampled_from(["warp", "crop"]),
    crop_pct=numbers,
    said_by=st.sampled_from(["checkpoint", "default"]),
)
verdicts = st.builds(
    Verdict,
    state=st.sampled_from(["pass", "rejected", "provisional", "unverified"]),
    content=texts,
    reference=texts,
    worst=shares,
    why=texts,
)
headers = st.builds(
    Metadata,
    family=st.just("replknet"),
    form=st.sampled_from(["training", "merged", "folded"]),
    geometry=st.just(GEOMETRY),
    label=lines,
    precision=st.sampled_from(["fp32", "fp16", "bf16"]),
    preprocessing=rules,
    source_sha256=hashes,
    source_name=texts,
    selected=st.from_regex(r"[\w-]{0,9}", fullmatch=True),
    version=texts,
    verdict=st.none() | verdicts,
)
FEW = settings(max_examples=150, deadline=None, derandomize=True)


def example(**changes: object) -> Metadata:
    made = Metadata(
        family="replknet",
        form="folded",
        geometry=GEOMETRY,
        label="RepLKNet-31B",
        precision="fp32",
        preprocessing=Preprocessing(
            size=(224, 320),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            resize="crop",
            crop_pct=0.875,
            said_by="checkpoint",
        ),
        source_sha256="a" * 64,
        source_name="checkpoint-best.pth",
        verdict=Verdict(state="pass", content="b" * 64, reference="a" * 64, worst=0.125, why="1.2× as far; limit 3×"),
    )
    return dataclasses.replace(made, **changes)


@FEW
@given(made=headers)
def test_every_field_survives_the_way_through_text(made: Metadata) -> None:
    strings = made.to_strings()
    assert all(isinstance(v, str) for v in strings.values())
    assert all(k.startswith("replk.") for k in strings)
    foreign = {"format": "pt", "producer": "x"}
    assert Metadata.from_strings(strings | foreign) == made


def test_sizes_and_constants_come_back_as_tuples_in_order() -> None:
    back = Metadata.from_strings(example().to_strings())
    assert back is not None
    assert back.preprocessing.size == (224, 320)
    assert isinstance(back.preprocessing.mean, tuple)
    assert RepLKNet.parse(back.geometry) == VARIANTS["RepLKNet-31B"]


def test_no_verdict_stays_no_verdict() -> None:
    made = example(verdict=None)
    assert "replk.verdict" not in made.to_strings()
    back = Metadata.from_strings(made.to_strings())
    assert back is not None
    assert back.verdict is None


@pytest.mark.parametrize("header", [{}, {"format": "pt"}, {"replkx": "1"}])
def test_a_header_that_is_not_ours_is_nobodys(header: dict[str, str]) -> None:
    assert Metadata.from_strings(header) is None


def test_a_field_of_a_newer_version_is_passed_over() -> None:
    assert Metadata.from_strings(example().to_strings() | {"replk.mood": "good"}) == example()


@pytest.mark.parametrize("name", ["family", "form", "geometry", "label", "precision", "preprocessing", "source_sha256"])
def test_a_field_that_is_missing_is_damage(name: str) -> None:
    strings = {k: v for k, v in example().to_strings().items() if k != f"replk.{name}"}
    with pytest.raises(ValueError, match="header is damaged"):
        Metadata.from_strings(strings)


@pytest.mark.parametrize("name", ["preprocessing", "verdict"])
@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"x"', "{}", '{"state": "pass"}', '{"size": [1], "x": 2}']
)
def test_a_field_that_does_not_parse_is_damage(name: str, text: str) -> None:
    with pytest.raises(ValueError, match="header is damaged"):
        Metadata.from_strings(example().to_strings() | {f"replk.{name}": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [("selected", text) for text in ("$(id>pwned)", "a\nb", "/../../../evil", "a.b", "a b")]
    + [("source_sha256", text) for text in ("", "a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61)]
    + [("label", "a\n::warning::b")],
)
def test_a_field_that_could_name_a_path_or_a_command_is_damage(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"header is damaged: {name}"):
        Metadata.from_strings(example().to_strings() | {f"replk.{name}": text})


RULES = {
    "size": (
        [64],
        [64, 64, 64],
        [0, 64],
        [-1, 64],
        [64.5, 64],
        ["64", "64"],
        [10**5, 64],
        64,
        "64",
        None,
        [True],
    ),
    "mean": ([0.5], [0.5, 0.5, "x"], [0.5, 0.5, float("nan")], 0.5, None),
    "std": ([0.5, 0.5, 0], [0.5, 0.5, -1], [0.5, 0.5, float("inf")], [None] * 3),
    "resize": ("stretch", 1, [], {}),
    "crop_pct": (0, -1, "x", None, float("inf")),
}
VERDICT = {"state": ("good", 1, None, []), "worst": ("x", []), "content": (1, None), "why": (None,)}


@pytest.mark.parametrize(
    ("field", "changes"),
    [("precision", "fp99"), ("form", "melted")]
    + [("preprocessing", {name: value}) for name, values in RULES.items() for value in values]
    + [("verdict", {name: value}) for name, values in VERDICT.items() for value in values],
    ids=str,
)
def test_a_value_of_another_kind_is_damage(field: str, changes: str | dict[str, object]) -> None:
    strings = example().to_strings()
    text = changes if isinstance(changes, str) else json.dumps(json.loads(strings[f"replk.{field}"]) | changes)
    with pytest.raises(ValueError, match="header is damaged: "):
        Metadata.from_strings(strings | {f"replk.{field}": text})


def test_a_header_without_end_is_damage() -> None:
    strings = example().to_strings()
    for text in ("[" * 10**5, strings["replk.preprocessing"].replace("0.875", "9" * 400)):
        with pytest.raises(ValueError, match="header is damaged"):
            Metadata.from_strings(strings | {"replk.preprocessing": text})
