"""The page is whole, holds what it is given, needs nothing from outside, and survives hostile texts and odd logs."""

import io
import json
import math
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych import report

HOSTILE = """</style><script>alert(1)</script><img src=x onerror="alert(2)"> & 'quoted' "twice" {braces} </p>"""
VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails where tags do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>: {names}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID or tag in {"line", "circle", "polyline"}
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]

    def having(self, tag: str, kind: str) -> int:
        return sum(name == tag and kind in (values.get("class") or "").split() for name, values in self.tags)


def picture(side: int = 16, seed: int = 0) -> Image.Image:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC)


def log(steps: int) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        losses = {"itc": 5.0 / step, "mlm": 4.0}
        record = {"step": step, "loss": sum(losses.values()), "losses": losses, "norm": 1.0, "lr": 1e-3}
        if step % 10 == 0:
            record |= {"samples_per_s": 50.0, "data_share": 0.02, "mfu": 0.3, "eta_s": 2.0 * (steps - step)}
            record |= {"memory_gb": 1.5, "skipped": 0}
        records.append(record)
    return records


def every_section(text: str) -> list[report.Section]:
    """One of each kind, with ``text`` wherever a text can be."""
    small, heat_WHW = picture(), np.random.default_rng(0).random((len(text.split()), 4, 4))
    table = report.Table(
        text,
        (report.Column(text), report.Column(text, muted=True)),
        (report.Rows(text, ((text, (text, text)),)),),
        spans=((text, 2),),
        note=text,
    )
    return [
        report.Figures(text, (report.Figure(text, text, text),), text),
        table,
        report.Captions(text, (report.Captioned(small, text, (text, "a dog"), True),), text),
        report.PictureSearches(text, (report.PictureSearch(text, (small, small), None, small),), text),
        report.TextSearches(text, (report.TextSearch(small, (text, text), 1, text),), text),
        report.AttentionMaps(text, (report.Attended(small, tuple(text.split()), ((text, heat_WHW),)),), text),
        report.Curves(text, (report.Line(text, text, (1, 2), (3.0, 4.0)),), text),
        report.Facts(text, {text: text}, text),
        report.Commands(text, ((text, text),), text),
        report.Text(text, text, text, text),
    ]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    path = report.write_report(
        tmp_path / "new" / "report.html", "A run", every_section("a red star"), lead="Of a run.", warning="Beware."
    )
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_holds_what_it_is_given(page: Page) -> None:
    for text in ("A run", "Of a run.", "Beware.", "a red star"):
        assert text in page.text
    assert sum(tag == "section" for tag, _ in page.tags) == len(every_section(""))


def test_the_page_needs_nothing_from_outside(page: Page, tmp_path: Path) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "audio", "video"}
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    assert not page.attributes("href")
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    for reference in ("http:", "https:", "url(", "@import", "srcset"):
        assert reference not in html


def test_pictures_are_embedded(page: Page) -> None:
    sources = page.attributes("src")
    assert len(sources) == 1 + 3 + 1 + (1 + 3)  # a caption, two found and the right one, a query, a picture and maps
    for source in sources:
        head, _, data = source.partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        Image.open(io.BytesIO(b64decode(data, validate=True))).load()
    assert all(page.attributes("alt"))


def decoded(address: str) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(address.partition(",")[2])))


def test_small_pictures_are_exact_and_large_ones_reduced() -> None:
    small = picture(64)
    assert np.array_equal(np.asarray(decoded(report.data_uri(small))), np.asarray(small))
    large = decoded(report.data_uri(picture(1000)))
    assert large.format == "JPEG"
    assert large.size == (320, 320)
    assert decoded(report.data_uri(small.convert("RGBA"))).mode == "RGB"


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    path = report.write_report(tmp_path / "report.html", HOSTILE, every_section(HOSTILE), lead=HOSTILE, warning=HOSTILE)
    page = Page(path.read_text(encoding="utf-8"))
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not page.attributes("onerror")
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    plain = " ".join(HOSTILE.split())
    assert page.text.count(plain) > 20
    assert plain in [" ".join(text.split()) for text in page.attributes("alt")]


# --- captions and searches --------------------------------------------------------------------------------------


def test_compare_finds_the_nearest_reference_and_what_differs() -> None:
    references = ("there is a dog", "a small red star at the top left")
    nearest, fits = report.compare("a small blue star at the bottom left", references)
    assert nearest == references[1]
    assert fits == [True, True, False, True, True, True, False, True]
    assert report.compare("a dog", ()) == ("", [True, True])
    assert report.compare("", references)[1] == []


def test_wrong_words_are_marked() -> None:
    item = report.Captioned(picture(), "a blue star", ("a red star",), False)
    html = report.Captions("", (item,)).body()
    assert "a <mark>blue</mark> star" in html
    assert ">wrong<" in html
    assert ">right<" not in html
    assert ">a red star<" in html
    same = report.Captions("", (report.Captioned(picture(), "a red star", ("a red star",), True),)).body()
    assert "word for word a reference" in same
    assert ">a red star<" in same
    unjudged = report.Captions("", (report.Captioned(picture(), "", ("a red star",)),)).body()
    assert "(nothing)" in unjudged
    assert ">wrong<" not in unjudged


def test_the_right_picture_is_framed() -> None:
    pictures = tuple(picture(seed=seed) for seed in range(3))
    found = Page(report.PictureSearches("", (report.PictureSearch("a star", pictures, 1, pictures[1]),)).body())
    assert found.having("figure", "right") == 1
    assert "2, right" in found.text
    assert len(found.attributes("src")) == 3
    missed = Page(report.PictureSearches("", (report.PictureSearch("a star", pictures, None, picture(seed=9)),)).body())
    assert missed.having("figure", "right") == 1
    assert missed.attributes("src")[-1] == report.data_uri(picture(seed=9))


def test_the_right_text_is_marked() -> None:
    found = Page(report.TextSearches("", (report.TextSearch(picture(), ("one", "two"), 1, "two"),)).body())
    assert found.having("li", "right") == 1
    assert found.having("p", "missed") == 0
    missed = Page(report.TextSearches("", (report.TextSearch(picture(), ("one", "two"), None, "three"),)).body())
    assert missed.having("li", "right") == 0
    assert "three" in missed.text


# --- attention --------------------------------------------------------------------------------------------------


def test_the_spotlight_is_where_the_heat_is() -> None:
    white = Image.new("RGB", (64, 64), "white")
    heat_HW = np.zeros((4, 4))
    heat_HW[1, 3] = 0.02
    lit_HWC = np.asarray(report.spotlight(white, heat_HW, side=96), dtype=float)
    assert lit_HWC.shape == (96, 96, 3)
    row, column = np.unravel_index(lit_HWC[:, :, 0].argmax(), (96, 96))
    assert (row // 24, column // 24) == (1, 3)
    assert lit_HWC.max() > 240
    assert lit_HWC[:, :24].max() < 40
    assert np.asarray(report.spotlight(white, np.zeros((4, 4)))).max() < 40


@pytest.mark.parametrize("count", [1, 11, 12, 23])
def test_long_texts_wrap_into_rows_of_maps(count: int) -> None:
    item = report.Attended(picture(), ("star",) * count, (("layer 1", np.ones((count, 2, 2))),))
    page = Page(report.AttentionMaps("", (item,)).body())
    assert sum(tag == "table" for tag, _ in page.tags) == math.ceil(count / 11)
    assert len(page.attributes("src")) == 1 + count


# --- curves -----------------------------------------------------------------------------------------------------


def test_curves_of_a_log() -> None:
    curves = report.curves_of(log(30))
    assert [(line.name, len(line.steps)) for line in curves.lines] == [
        ("Image-text contrast (ITC)", 30),
        ("Masked language (MLM)", 30),
        ("Sum of the losses", 30),
        ("Learning rate", 30),
    ]
    page = Page(curves.body())
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert page.text.count("step") == 4
    assert page.text.count("loss ") == 3


def test_curves_of_what_was_measured() -> None:
    records = [{"step": step, "loss": 1.0, "losses": {"mim": 1.0}, "busiest": 1.5, "idle": 0.25} for step in (1, 2)]
    curves = report.curves_of(records)
    assert [(line.name, line.unit, line.values) for line in curves.lines] == [
        ("Masked image (MIM)", "loss", (1.0, 1.0)),
        ("Busiest expert", "times an equal share", (1.5, 1.5)),
        ("Experts without a token", "share", (0.25, 0.25)),
    ]
    assert report.curves_of(log(30) + records).lines[-1].unit == "share"


def test_an_empty_log_has_no_curves() -> None:
    assert report.curves_of([]).lines == ()
    assert "Nothing was logged" in Page(report.curves_of([]).body()).text
    assert report.curves_of([{"step": 3, "metrics": {"CIDEr": 1.0}}]).lines == ()


@pytest.mark.parametrize(
    "values",
    [(2.0,), (0.0,), (0.0, 0.0), (-1.0, -1.0), (1e-6, 1e-7), (1e9, 2e9), (math.nan, 1.0), (math.inf, -2.0, 1.0)],
)
def test_odd_values_are_drawn_inside_of_the_chart(values: tuple[float, ...]) -> None:
    html = report.chart(report.Line("loss", "loss", tuple(range(1, len(values) + 1)), values))
    page = Page(html)
    assert "nan" not in html
    assert "inf" not in html
    points = [float(part) for line in page.attributes("points") for pair in line.split() for part in pair.split(",")]
    assert len(points) == 2 * 2 * sum(map(math.isfinite, values))
    assert all(0 <= x <= 340 for x in points[::2])
    assert all(0 <= y <= 210 for y in points[1::2])


def test_a_line_without_finite_values_says_so() -> None:
    assert "no values" in report.chart(report.Line("loss", "loss", (1,), (math.nan,)))
    assert "no values" in report.chart(report.Line("loss", "loss", (), ()))


def test_long_lines_are_thinned() -> None:
    steps = tuple(range(1, 5001))
    page = Page(report.chart(report.Line("loss", "loss", steps, tuple(map(float, steps)))))
    assert [len(line.split()) for line in page.attributes("points")] == [240, 240]


def test_smoothing() -> None:
    straight = np.linspace(3.0, -1.0, 50)
    assert np.allclose(report.smoothed(straight, 7)[:-7], straight[:-7])
    noisy = np.where(np.arange(50) % 2, 0.5, -0.5)
    assert np.abs(report.smoothed(noisy, 7)[10:]).max() < 0.1
    assert np.allclose(report.smoothed(np.arange(5.0), 1), [0, 1, 2, 3, 3.5])
    assert np.array_equal(report.smoothed(np.array([4.0]), 3), [4.0])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7.3), (0, 0), (-3, 5), (0, 1e-5), (0, 2000), (4, 4), (-2, -2), (0, 0.1 + 0.2)]
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    marks = report.ticks(low, high, 4)
    assert marks[0] <= low
    assert marks[-1] >= high - 1e-12
    assert 2 <= len(marks) <= 9
    steps = np.diff(marks)
    assert np.allclose(steps, steps[0])
    assert float(f"{steps[0]:.0e}") == pytest.approx(steps[0])


# --- what every run has -----------------------------------------------------------------------------------------


def test_training_seconds_are_those_of_the_steps() -> None:
    records = [{"step": 10, "eta_s": 180.0}, {"step": 50, "eta_s": 150.0}, {"step": 100, "eta_s": 0.0}]
    # 2 s a step for 10 steps, 3 s for 40, and as fast to the end, of which the log does not tell.
    assert report.training_seconds(records, 100) == pytest.approx(20 + 120 + 150)
    assert report.training_seconds([{"step": 100, "eta_s": 0.0}], 100) is None
    assert report.training_seconds([], 100) is None


def test_speed_of_a_run() -> None:
    facts = report.speed(log(30), 30)
    assert facts["steps"] == "30 of 30"
    assert facts["time of the steps"] == "1 min 0 s"
    assert facts["throughput"] == "50.0 samples/s"
    assert facts["waiting for data"] == "2.0% of the time"
    assert report.speed([], 30) == {"steps": "0"}
    assert report.speed(log(3), 30) == {"steps": "3"}


def test_sections_of_a_folder_without_a_run(tmp_path: Path) -> None:
    sections = report.run_sections(tmp_path)
    path = report.write_report(tmp_path / "report.html", "Nothing", sections)
    assert "Nothing was logged" in Page(path.read_text(encoding="utf-8")).text


def test_sections_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log(20)) + '{"step": 21, "lo')
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "tiny", "train": {"steps": 40}}))
    path = report.write_report(tmp_path / "report.html", "A run", report.run_sections(tmp_path))
    page = Page(path.read_text(encoding="utf-8"))
    for text in ("20 of 40", "Masked language (MLM)", "PyTorch", "tiny: the complete configuration"):
        assert text in page.text


def test_the_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert report.commit() is None
    facts = report.environment()
    assert facts["commit"] == "not a git checkout"
    assert facts["processor"]


def test_durations() -> None:
    assert report.duration(8.25) == "8.2 s"
    assert report.duration(59.99) == "60.0 s"
    assert report.duration(200.4) == "3 min 20 s"
    assert report.duration(7530) == "2 h 5 min"
