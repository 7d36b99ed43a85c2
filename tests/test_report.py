"""The report says what the records say, in every form; records that do not agree with themselves are refused."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from typer.testing import CliRunner

import replk_deploy
from replk_deploy import cli, pipeline
from replk_deploy.errors import IntegrityError, ReplkError
from replk_deploy.files import sha256
from replk_deploy.models.replknet import RepLKGeometry
from replk_deploy.pipeline import entries
from replk_deploy.pipeline.racing import label
from replk_deploy.report import facts, forms, sections
from replk_deploy.workspace import Workspace
from tests import networks

SCHEMA = json.loads((Path(replk_deploy.__file__).parent / "schemas" / "report-1.json").read_text(encoding="utf-8"))
REQUIRED = os.environ.get("REPLK_REQUIRE_BROWSER") == "1"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
PHONE = 390
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(13, 7), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)


RIGHT = {"step": "trained", "top1": 0.5, "correct": 1, "images": 2, "same_as_first": 2}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export, a latency and a receptive field; never change it."""
    root = tmp_path_factory.mktemp("report")
    path = networks.save_as_trained(networks.trained(TINY), root / "best.pth", crop_pct=1.0)
    with pytest.MonkeyPatch.context() as patch:
        networks.shorten_timing(patch)
        done = pipeline.deploy(path, root=root / "out", backends=("ort-cpu",), batches=(1, 2), max_seconds=0.01)
    return done.folder


@pytest.fixture(scope="module")
def whole(deployed: Path) -> str:
    """Its page."""
    return (deployed / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def run(deployed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed, tmp_path / "out" / deployed.name))


def change(path: Path, alter: Callable[[Any], None]) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    alter(record)
    path.write_text(json.dumps(record), encoding="utf-8")


class Words(HTMLParser):
    """The cells and all the words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False
        self.all: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag in {"td", "th"} or (tag == "code" and self.inside)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        self.all.append(data)
        if self.inside:
            self.cells[-1] += data


def tables(text: str) -> list[list[list[str]]]:
    """Read Markdown tables as GitHub does: an escaped character is itself."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([re.sub(r"\\(.)", r"\1", c.strip()) for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [t for t in found if t]


def test_all_forms_hold_the_numbers_of_the_records(run: Path, whole: str) -> None:
    report = facts.read([run])
    fused = json.loads((run / "results" / "fused.safetensors.json").read_text())
    bench = json.loads((run / "results" / "bench.json").read_text())
    said = [f"{a['rel_l2']:.1e}" for a in fused["proof"]["agreements"]]
    said += [f"{a['worst']:.2f}" for a in fused["proof"]["agreements"]]
    said += [f"{row['p50_ms']['value']:.3f}" for row in bench["rows"]]
    page, text = Words(whole), forms.markdown(report)
    for number in said:
        assert any(number in cell for cell in page.cells)
        assert number in text
    stored = json.loads(forms.as_json(report))
    checks = stored["runs"][0]["steps"][0]["checks"]
    assert [(c["error"], c["share"]) for c in checks] == [
        (a["rel_l2"], a["worst"]) for a in fused["proof"]["agreements"]
    ]
    assert [r["p50_ms"] for r in stored["runs"][0]["bench"]["rows"]] == [r["p50_ms"] for r in bench["rows"]]
    for written in sections.sections(report):
        for part in written.parts:
            if isinstance(part, sections.Table):
                assert {cell for row in part.rows for cell in row} <= set(page.cells)
                plain = [[cell.strip("*`") for cell in row] for table in tables(text) for row in table]
                assert all(list(row) in plain for row in (part.head, *part.rows))


def test_the_json_has_the_published_schema(run: Path) -> None:
    written = json.loads(forms.as_json(facts.read([run])))
    jsonschema.validate(written, SCHEMA)
    for spoil in (
        lambda r: r["runs"][0]["steps"][0].pop("worst"),
        lambda r: r["runs"][0]["steps"][0].update(state="fine"),
        lambda r: r.update(schema="replk.report/2"),
        lambda r: r["runs"].clear(),
    ):
        bad = json.loads(json.dumps(written))
        spoil(bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, SCHEMA)


def test_the_same_records_give_the_same_text(run: Path) -> None:
    before = {p.name: p.read_bytes() for p in run.glob("report.*")}
    assert set(before) == {"report.html", "report.md", "report.json"}
    pipeline.report([run])
    assert {p.name: p.read_bytes() for p in run.glob("report.*")} == before


@pytest.mark.parametrize(
    ("file", "alter"),
    [
        ("fused.safetensors.json", lambda r: r["proof"]["agreements"][0].update(rel_l2=1e-20)),
        ("fused.safetensors.json", lambda r: r["proof"]["agreements"][0]["rows"][0].update(share=0.9)),
        ("fused.safetensors.json", lambda r: r["verdict"].update(worst=0.001)),
        ("model.fp32.onnx.json", lambda r: r["verdict"].update(state="provisional")),
        ("model.fp32.onnx.json", lambda r: r.pop("proof")),
        ("bench.json", lambda r: r["rows"][0]["p50_ms"].update(value=0.001)),
        ("bench.json", lambda r: r["rows"][0]["p90_ms"].update(value=0.001)),
        ("bench.json", lambda r: r["rows"][0].pop("blocks")),
        ("bench.json", lambda r: r.update(schema="replk.bench/99")),
        ("bench.json", lambda r: r["rows"][0]["p50_ms"].update(interval=[0.0, 9e9])),
        ("bench.json", lambda r: r.update(rows=[])),
        ("erf.json", lambda r: r.update(schema="replk.erf/2")),
        ("erf.json", lambda r: r.pop("fields")),
        ("erf.json", lambda r: r["fields"][0].update(cells="text")),
        ("deployment.json", lambda r: r["inspection"].pop("macs")),
        ("deployment.json", lambda r: r.update(accuracy=[RIGHT | {"top1": "x"}])),
        ("deployment.json", lambda r: r.update(accuracy=[RIGHT | {"top1": 1.0}])),
        ("deployment.json", lambda r: r["bench"]["agreements"]["ort-cpu"].update(state="rejected")),
        ("deployment.json", lambda r: r.pop("schema")),
    ],
)
def test_an_altered_record_is_refused_and_the_old_report_stays(
    run: Path, file: str, alter: Callable[[Any], None]
) -> None:
    change(run / "results" / file, alter)
    before = {p.name: p.read_bytes() for p in run.glob("report.*")}
    done = CliRunner().invoke(cli.app, ["report", str(run)])
    assert done.exit_code == 6, done.output
    assert "fix" in done.output
    assert {p.name: p.read_bytes() for p in run.glob("report.*")} == before


def each_row(**changes: Any) -> Callable[[Any], None]:
    def alter(record: Any) -> None:
        for judged in record["proof"]["agreements"]:
            for told in (judged, *judged["rows"]):
                told |= {name: value for name, value in changes.items() if name in told}

    return alter


def gates(limit: float) -> Callable[[Any], None]:
    def alter(record: Any) -> None:
        for judged in record["proof"]["agreements"]:
            judged["bound"]["rel_l2"] = dict.fromkeys(judged["bound"]["rel_l2"], limit)

    return alter


@pytest.mark.parametrize(
    "alter",
    [
        each_row(rel_l2=0.9),
        each_row(peak=0.9),
        each_row(top1="flip"),
        gates(1e-12),
        lambda r: r["proof"].update(structure=["35 tensors are not the fused ones"]),
        lambda r: r["proof"].update(state="rejected"),
        lambda r: r["proof"].update(agreements=[]),
        lambda r: r["proof"]["agreements"][0].update(state="rejected"),
        lambda r: r["proof"]["agreements"][0].update(rows=[]),
        lambda r: r["proof"]["agreements"][0].update(doubt="a doubt", state="provisional", rel_l2=1.0),
        lambda r: r["proof"].update(doubt="a doubt"),
        lambda r: r.update(proof=None),
    ],
)
def test_a_verdict_that_its_rows_do_not_give_is_refused(run: Path, alter: Callable[[Any], None]) -> None:
    path = run / "results" / "model.fp32.onnx.json"
    change(path, alter)
    with pytest.raises(IntegrityError, match="its hash differs"):
        facts.read([run])
    change(run / "manifest.json", lambda r: r["artefacts"]["model.fp32.onnx"].update(record=sha256(path)))
    with pytest.raises(IntegrityError, match=r"its rows say|what was compared says|there is no proof"):
        facts.read([run])


def test_the_record_of_a_run_that_is_taken_up_again_is_checked(run: Path) -> None:
    change(run / "results" / "model.fp32.onnx.json", lambda r: r["export"].update(opset=1))
    with pytest.raises(IntegrityError, match="its hash differs"):
        entries.result(Workspace.open(run), "model.fp32.onnx", "exported")


def test_weights_that_needed_no_fusing_keep_their_verdict(run: Path, tmp_path: Path) -> None:
    again = pipeline.fuse(run / "fused.safetensors", root=tmp_path / "again")
    (step,) = facts.read([again.file.parent]).runs[0].steps
    assert (step.state, step.checks) == ("pass", ())


@pytest.mark.parametrize("file", ["fused.safetensors", "model.fp32.onnx", "results/fused.safetensors.json"])
def test_a_missing_file_is_refused(run: Path, file: str) -> None:
    (run / file).unlink()
    with pytest.raises(IntegrityError, match=r"is missing"):
        facts.read([run])


def test_an_altered_artefact_is_refused(run: Path) -> None:
    with (run / "model.fp32.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="hash differs"):
        facts.read([run])


def failed(run: Path, error: Any = 3.0) -> None:
    """Let the run hold an export that was rejected."""
    record = json.loads((run / "results" / "model.fp32.onnx.json").read_text())
    judged = record["proof"]["agreements"][0]
    share = error / judged["bound"]["rel_l2"][judged["rows"][0]["output"]] if error == 3.0 else "inf"
    judged["rows"][0] |= {"rel_l2": error, "share": share}
    judged |= {"rel_l2": error, "worst": share, "state": "rejected"}
    record["proof"] |= {"state": "rejected", "worst": share}
    worst = share if error == 3.0 else None
    record["verdict"] |= {"state": "rejected", "worst": worst, "why": "logits | are <b>wrong</b>"}
    (run / "rejected").mkdir()
    (run / "rejected" / "model.fp32.onnx.json").write_text(json.dumps(record))


@pytest.mark.parametrize("error", [3.0, "nan"])
def test_a_failing_proof_is_told_first_in_every_form(run: Path, error: Any) -> None:
    failed(run, error)
    places = ["--junit", str(run / "a.xml")]
    done = CliRunner().invoke(
        cli.app,
        ["report", str(run), *places, "--html", str(run / "a.html"), "--markdown", str(run / "a.md"), "--json", "-"],
    )
    assert done.exit_code == 3, done.output
    stored = json.loads(done.stdout)
    jsonschema.validate(stored, SCHEMA)
    assert stored["state"] == stored["runs"][0]["state"] == "rejected"
    assert done.stderr.strip().splitlines()[-1].startswith("FAIL report")
    page = Words((run / "a.html").read_text())
    assert next(w for w in page.all if w.strip() in sections.WORDS.values()) == "FAIL"
    assert "FAIL" in page.cells
    assert any("<b>wrong</b>" in word for word in page.all), "words of a record are words, not markup"
    suite = ET.parse(run / "a.xml").getroot()  # ours
    failures = {case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None}
    assert failures == {f"{run.name}: model.fp32.onnx", f"{run.name}: model.fp32.onnx: checkpoint"}
    text = (run / "a.md").read_text()
    assert text.splitlines()[0].endswith(": rejected")
    assert "**FAIL**" in text
    assert "\\<b\\>" in text
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}


LOST = {"torch b1": "the GPU was lost"}


@pytest.mark.parametrize(
    ("file", "alter", "code", "said", "tag"),
    [
        ("bench.json", lambda r: r.update(failures=LOST), 5, "torch b1 failed: the GPU was lost", "error"),
        ("deployment.json", lambda r: r.update(problem="no pictures", code=2), 2, "no pictures", "error"),
        ("deployment.json", lambda r: r.update(problem="it is NaN", code=3, wrong=True), 3, "it is NaN", "failure"),
        ("erf.json", lambda r: r.update(apart=2e-2), 3, "receptive field by 2.0e-02, limit 1e-02", "failure"),
        ("erf.json", lambda r: r.update(apart="nan"), 3, "receptive field by nan, limit 1e-02", "failure"),
    ],
)
def test_a_failed_deployment_is_told_first_though_every_file_passed(
    run: Path, file: str, alter: Callable[[Any], None], code: int, said: str, tag: str
) -> None:
    change(run / "results" / file, alter)
    line = ["report", str(run), "--junit", str(run / "a.xml"), "--markdown", str(run / "a.md"), "--json", "-"]
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == code, done.output
    stored = json.loads(done.stdout)
    jsonschema.validate(stored, SCHEMA)
    state, word = ("rejected", "FAIL") if code == 3 else ("error", "ERROR")
    assert stored["state"] == stored["runs"][0]["state"] == state
    assert done.stderr.strip().splitlines()[-1].startswith(f"{word} report")
    title, _, first = (run / "a.md").read_text().splitlines()[:3]
    assert title.endswith(f": {state}")
    assert first.startswith(f"**{word}** ")
    assert said in first
    (wrong,) = [[part.tag for part in case][:1] for case in ET.parse(run / "a.xml").iter("testcase") if bad(case)]
    assert wrong == [tag]


def bad(case: ET.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def test_what_ends_a_deployment_early_is_in_its_report(deployed: Path, run: Path, tmp_path: Path) -> None:
    for name in map(str, range(TINY.classes)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "a.png").write_text("no picture")
    with pytest.raises(ReplkError, match="is not a picture") as stopped:
        pipeline.deploy(
            deployed.parent.parent / "best.pth", root=run.parent, backends=("ort-cpu",), data=tmp_path / "pictures"
        )
    found = facts.read([run])
    assert (found.state, found.code, found.runs[0].problem) == ("error", stopped.value.code, str(stopped.value))


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "out" / "other"))
    failed(other)
    report = pipeline.report([run, other], markdown=tmp_path / "both.md")
    assert (report.state, [r.state for r in report.runs]) == ("rejected", ["pass", "rejected"])
    first = sections.sections(report)[0]
    assert first.title == "Side by side"
    assert [row[:2] for row in first.parts[0].rows] == [(run.name, "PASS"), ("other", "FAIL")]
    with pytest.raises(ReplkError, match="twice"):
        pipeline.report([run, run], html=tmp_path / "x.html")
    with pytest.raises(ReplkError, match="none of them"):
        pipeline.report([run, other])


def test_a_baseline_is_not_taken_for_the_network(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "out" / "other"))
    timed = json.loads((run / "results" / "bench.json").read_text())["rows"]
    slowest = max(row["p50_ms"]["value"] for row in timed)

    def tell(row: Any, ms: float) -> None:
        for percent in ("p50_ms", "p90_ms", "p99_ms"):
            if row[percent]:
                row[percent]["value"] = ms
                row[percent]["interval"] = row[percent]["interval"] and [ms, ms]
        row["samples_ms"] = [ms] * len(row["samples_ms"])

    def race(record: Any) -> None:
        for row in record["rows"]:
            tell(row, slowest * row["batch"])
        peer = json.loads(json.dumps(record["rows"][0]))
        name = f"{label('timm:swin_tiny_patch4_window7_224')} {peer['name']}"
        peer |= {"model": label("timm:swin_tiny_patch4_window7_224"), "name": name}
        peer["facts"]["sha256"] = "0" * 64
        tell(peer, slowest / 1000)
        record["rows"].append(peer)

    change(run / "results" / "bench.json", race)
    found = sections.sections(facts.read([run, other]))
    fastest = found[0].parts[0].rows[0][-2]
    assert fastest == f"{slowest:.3f}"
    doubts = [part.text for part in of(found, f"Latency · {run.name}") if isinstance(part, sections.Doubt)]
    assert not [text for text in doubts if "no longer holds" in text]

    change(run / "results" / "bench.json", lambda record: record["rows"][0]["facts"].update(sha256="0" * 64))
    found = sections.sections(facts.read([run, other]))
    doubts = [part.text for part in of(found, f"Latency · {run.name}") if isinstance(part, sections.Doubt)]
    assert [text for text in doubts if "no longer holds" in text]


def of(found: tuple[sections.Section, ...], title: str) -> tuple[sections.Part, ...]:
    return next(section.parts for section in found if section.title == title)


def test_a_place_that_cannot_be_written_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(cli.app, ["report", str(run), "--html", str(tmp_path / "file" / "r.html")])
    assert done.exit_code == 2
    assert "cannot be written" in done.output
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "not a run folder" in done.output


def test_the_page_needs_nothing_but_itself(whole: str) -> None:
    parsed, page = Words(whole), whole
    assert not [tag for tag, _ in parsed.tags if tag in {"script", "iframe", "object"}]
    fetched = [v for _, attrs in parsed.tags for k, v in attrs.items() if k in {"src", "href", "xlink:href"} and v]
    assert all(v.startswith(("#", "data:")) for v in fetched)
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(BROWSER is None and not REQUIRED, reason="no chromium: apt-get install chromium")
def test_a_browser_shows_it_without_complaint_and_within_a_phone(whole: str, tmp_path: Path) -> None:
    assert BROWSER, "REPLK_REQUIRE_BROWSER is set and there is no chromium"
    page = whole
    probe = """<body><iframe id=f style="width:%dpx;height:900px;border:0"></iframe><pre id=out></pre><script>
    f.srcdoc = %s; f.onload = () => { const d = f.contentDocument;
    const wide = [...d.querySelectorAll("main *")].filter(e => !e.closest(".wide table, pre, svg") &&
      e.getBoundingClientRect().right > %d + 0.5).map(e => e.tagName);
    const flat = [...d.querySelectorAll("figure svg")].filter(e => e.getBoundingClientRect().height < 50).length;
    out.textContent = JSON.stringify({scroll: d.documentElement.scrollWidth, wide, flat,
      pictures: d.querySelectorAll("figure svg").length}); }</script></body>"""
    text = json.dumps(page).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(probe % (PHONE, text, PHONE), encoding="utf-8")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    done = browse(tmp_path, "--dump-dom", "probe.html")
    found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', done.stdout)[1])
    assert found["pictures"] == page.count("<svg ")
    assert found | {"pictures": 0} == {"scroll": PHONE, "wide": [], "flat": 0, "pictures": 0}
    assert "CONSOLE" not in browse(tmp_path, f"--screenshot={tmp_path / 'page.png'}", "page.html").stderr
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def browse(folder: Path, what: str, page: str) -> subprocess.CompletedProcess[str]:
    profile = folder / f"profile-{page}-{what[2:6]}"
    command = [
        BROWSER,
        *FLAGS,
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        what,
        f"file://{folder / page}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
