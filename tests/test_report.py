"""Reports: one file that needs nothing else, foreign text that stays text, curves that go through their points."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy
import pytest
from PIL import Image

from src import report


class Reader(HTMLParser):
    """Collects tags with their attributes and the text; counts what was opened and not closed."""

    VOID = frozenset({"meta", "img", "path", "use", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(data: bytes) -> Reader:
    reader = Reader()
    reader.feed(data.decode("utf-8"))
    reader.close()
    return reader


def whole_report() -> bytes:
    drawing = Image.new("RGB", (64, 48), "red")
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype="uint8"))
    return report.page(
        "Report",
        report.section("Facts", report.facts({"rank": 4, "alpha": None, "learning rate": 1e-4, "flip": False})),
        report.section(
            "Charts",
            report.gallery(
                [
                    report.curves("Loss", {"a": [(0, 1.0), (1, 0.5)], "b": [(0, 0.2)]}, "step", "loss", marks={"best": 1}),
                    report.bars("Time", {"load": 1.5, "train": 20}, "seconds"),
                ]
            ),
        ),
        report.section("Pictures", report.gallery([report.picture(drawing, "one"), report.picture(noise, "two\nlines")])),
        report.table(["step", "picture"], [[1, report.picture(drawing)], [2, None]], marked=[1]),
    )


def test_a_report_needs_nothing_from_elsewhere() -> None:
    data = whole_report()
    assert re.findall(rb"https?:|//[a-z]|@import|url\((?!#)", re.sub(rb"base64,[^\"]+", b"", data)) == []
    for tag, attributes in read(data).tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert attributes.get("src", "data:").startswith("data:")
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith("#")


def test_every_tag_is_closed_and_every_reference_has_its_target() -> None:
    reader = read(whole_report())
    assert reader.open == []
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    used = {attributes["xlink:href"][1:] for _, attributes in reader.tags if "xlink:href" in attributes}
    used |= set(re.findall(r"url\(#([^)]+)\)", whole_report().decode()))
    assert used <= ids
    assert used


def test_the_same_report_is_the_same_bytes() -> None:
    assert whole_report() == whole_report()


HOSTILE = '<script>alert(1)</script> & "q" \' {{ 7 * 7 }} </style> $x_1$ \ud800'


@pytest.mark.parametrize(
    "part",
    [
        lambda text: text,
        report.text,
        lambda text: report.section(text, text),
        lambda text: report.facts({text: text}),
        lambda text: report.table([text], [[text]]),
        lambda text: report.picture(Image.new("RGB", (8, 8)), text),
        lambda text: report.gallery([text]),
        lambda text: report.curves(text, {"a": [(0, 1)], "b$": [(0, 2)]}, "x", "y"),
        lambda text: report.bars(text, {"$ <b>": 1.0}, "y"),
    ],
)
def test_foreign_text_stays_text(part) -> None:
    data = report.page(HOSTILE, part(HOSTILE))
    reader = read(data)
    assert not {"script", "b"} & {tag for tag, _ in reader.tags}
    assert "<script>alert(1)</script>" in reader.text
    assert "{{ 7 * 7 }}" in reader.text
    assert reader.open == []


def pixels_of(figure: str) -> numpy.ndarray:
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', figure).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == kind
    return numpy.array(image)


def test_a_drawing_is_kept_exactly_and_a_photo_is_made_small() -> None:
    drawing = Image.new("RGB", (200, 100), "white")
    drawing.paste((200, 30, 30), (20, 20, 90, 70))
    assert numpy.array_equal(pixels_of(report.picture(drawing)), numpy.array(drawing))
    x, y = numpy.mgrid[0:700, 0:900]
    noise = numpy.random.default_rng(0).normal(0, 12, (700, 900, 3))
    photo = Image.fromarray((numpy.stack([x / 3, y / 4, (x + y) / 7], 2) + noise).clip(0, 255).astype("uint8"))
    figure = report.picture(photo, max_px=300)
    assert pixels_of(figure).shape == (233, 300, 3)
    assert len(figure) < 60_000
    difference = pixels_of(figure).astype(float) - numpy.array(photo.resize((300, 233), Image.Resampling.LANCZOS))
    assert abs(difference).mean() < 12


def test_a_picture_brings_no_hidden_data_along() -> None:
    image = Image.new("RGB", (80, 80), "white")
    image.paste((0, 0, 255), (20, 20, 90, 70))
    image.info = {"parameters": "secret", "transparency": (0, 0, 255)}  # Pillow would make blue invisible
    data = base64.b64decode(re.search('base64,([^"]+)', report.picture(image))[1])
    assert Image.open(io.BytesIO(data)).info == {}
    assert image.info["parameters"] == "secret", "the caller's picture was changed"


def test_every_mode_is_shown() -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I;16"):
        assert pixels_of(report.picture(Image.new(mode, (10, 10)))).shape[:2] == (10, 10)


def path_points(svg: str, colour: int) -> list[tuple[float, float]]:
    path = re.search(rf'<path d="([^"]+)"[^>]*stroke: var\(--series-{colour}\)', svg)[1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_a_curve_is_an_affine_image_of_its_points() -> None:
    values = [(0, 1.0), (10, 3.0), (20, 2.0), (40, 2.5)]
    drawn = numpy.array(path_points(report.curves("t", {"a": values}, "x", "y"), 0))
    given = numpy.array(values)
    for axis in (0, 1):
        slope, offset = numpy.polyfit(given[:, axis], drawn[:, axis], 1)
        assert slope > 0 if axis == 0 else slope < 0  # SVG counts from the top
        assert numpy.allclose(slope * given[:, axis] + offset, drawn[:, axis], atol=0.02)


def test_what_is_not_finite_is_left_out_and_on_a_logarithmic_axis_what_is_not_positive() -> None:
    values = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 0.0), (4, 100.0), (5, 10.0)]
    assert len(path_points(report.curves("t", {"a": values}, "x", "y"), 0)) == 4
    y = [y for _, y in path_points(report.curves("t", {"a": values}, "x", "y", log_y=True), 0)]
    assert len(y) == 3
    assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(0.5, abs=0.01)


def test_a_long_curve_is_thinned_and_keeps_its_peaks() -> None:
    values = [(x, 0.5) for x in range(100_000)]
    values[43_210] = (43_210, 9.0)
    svg = report.curves("t", {"a": values}, "x", "y")
    drawn = path_points(svg, 0)
    assert len(drawn) <= report.MAX_POINTS
    assert min(y for _, y in drawn) < 15, "the peak is gone"
    assert len(svg) < 40_000
    dots = report.curves("t", {"a": [(x, x % 7) for x in range(100_000)]}, "x", "y", points=("a",))
    assert len(dots) < 100_000


def test_charts_of_nothing_are_still_charts() -> None:
    assert "<svg" in report.curves("t", {}, "x", "y")
    assert "<svg" in report.curves("t", {"a": []}, "x", "y", log_y=True)
    assert "<svg" in report.bars("t", {}, "y")
    assert "<svg" in report.bars("t", {"a": 0.0}, "y")


def test_the_page_reads_in_the_dark() -> None:
    """No colour of matplotlib's own is left: every one follows the page."""
    svg = report.curves("t", {str(i): [(0, i), (1, i)] for i in range(8)}, "x", "y") + report.bars("u", {"a": 1}, "y")
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
    assert b"prefers-color-scheme: dark" in report.page("t")


def test_numbers_are_written_for_readers() -> None:
    text = read(report.page("t", report.table(["a"] * 6, [[1234567, 0.000123456, 12345.6, None, True, ("x", 2)]]))).text
    for shown in ("1,234,567", "0.0001235", "12,346", "–", "yes", "x, 2"):
        assert shown in text
