"""A report as one HTML file that needs nothing else: no network, no scripts; it reads in light and in dark and on a phone.

The parts are made by functions and put together by ``page``. Each part is escaped when it is made (``Markup``), so a caption
or a file name out of a foreign data set can hold anything; a plain string that is passed as a part is escaped, too.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

MAX_POINTS = 400  # of a curve: more than the pixels that show it
LOSSLESS_BONUS = 1.5  # the PNG of a drawing may be so much larger than the lossy file
_DRAWING_COLOURS = 1024  # a picture of no more colours is tried as PNG
_SMALL_PX = 128  # a picture smaller than this is shown at twice its size
_SERIES_COLOURS = 6
# Colours that matplotlib is given, and what they become in the page, where they follow the reader's light or dark.
_INK, _GRID = "#010101", "#020202"
_SERIES = [f"#0101{number:02x}" for number in range(16, 16 + _SERIES_COLOURS)]
_CSS_COLOURS = {_INK: "currentColor", _GRID: "var(--line)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)
}
_CLUTTER = r'<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>| transform="rotate\(-0 [^"]*"'
_STYLE = {
    "text.parse_math": False,  # a $ is a $
    "svg.hashsalt": "report",  # ids from the contents: the same report is the same bytes
    "svg.fonttype": "none",  # letters as text: smaller, and searchable
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}

_CSS = """
:root { color-scheme: light dark; --paper: #fdfdfc; --card: #ffffff; --ink: #1d1f23; --soft: #666b73; --line: #d9dbde;
  --mark: #fff3cf; --series-0: #1f6fb2; --series-1: #d1601f; --series-2: #23875a; --series-3: #a13d8f;
  --series-4: #8a6d00; --series-5: #5a5fc0; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --card: #1e2125; --ink: #e7e8ea; --soft: #a0a5ad;
  --line: #3b4047; --mark: #463c1c; --series-0: #69b1ef; --series-1: #f39a62; --series-2: #62c795; --series-3: #de8ccf;
  --series-4: #d8bc4e; --series-5: #a3a7f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
section { margin: 2.25rem 0; padding-top: 1.25rem; border-top: 1px solid var(--line); }
section section { margin: 1.5rem 0; border: 0; padding: 0; }
td { white-space: pre-line; }
p { max-width: 46rem; margin: 0 0 .75rem; white-space: pre-line; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
td { overflow-wrap: break-word; max-width: 30rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:has(img) { padding-right: .4rem; }
tr:has(img) td:first-child { min-width: 9rem; }
table.facts { width: 100%; max-width: 46rem; }
table.facts th { width: 14rem; max-width: 40vw; }
tr.marked td { background: var(--mark); }
td:first-child, th:first-child { padding-left: .4rem; }
.gallery { display: flex; flex-wrap: wrap; gap: .9rem; margin-bottom: 1rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
figure.chart { flex: 1 1 24rem; max-width: 44rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .75rem; margin-bottom: .75rem; }
figure.chart figcaption { font-weight: 600; font-size: .95rem; margin: 0 0 .25rem; color: inherit; max-width: none; }
figcaption { font-size: .8rem; line-height: 1.35; color: var(--soft); white-space: pre-line; overflow-wrap: anywhere;
  margin-top: .3rem; }
img { display: block; max-width: 100%; height: auto; border-radius: .25rem; }
td img { max-width: none; }
img.small { image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
""".strip()

_TEMPLATES = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_PAGE = _TEMPLATES.from_string("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
{{ css }}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for part in parts %}
{{ part }}
{% endfor %}
</main>
</body>
</html>
""")
_SECTION = _TEMPLATES.from_string("""<section>
<h2>{{ title }}</h2>
{% for part in parts %}
{{ part }}
{% endfor %}
</section>""")
_FACTS = _TEMPLATES.from_string("""<div class="scroll"><table class="facts">
{% for name, value in pairs %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>""")
_TABLE = _TEMPLATES.from_string("""<div class="scroll"><table>
<thead><tr>{% for name, kind in columns %}<th scope="col"{{ kind }}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells, is_marked in rows %}
<tr{% if is_marked %} class="marked"{% endif %}>{% for value, kind in cells %}<td{{ kind }}>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>""")
_PICTURE = _TEMPLATES.from_string(
    '<figure><img src="{{ uri }}" width="{{ width }}" height="{{ height }}" alt="{{ alt }}"'
    '{% if is_small %} class="small"{% endif %}>'
    '{% if caption %}<figcaption style="max-width: {{ [width, 96] | max }}px">{{ caption }}</figcaption>{% endif %}</figure>'
)
_GALLERY = _TEMPLATES.from_string("""<div class="gallery">
{% for figure in figures %}
{{ figure }}
{% endfor %}
</div>""")
_CHART = _TEMPLATES.from_string('<figure class="chart"><figcaption>{{ title }}</figcaption>\n{{ svg }}</figure>')


def page(title: str, *parts: str) -> bytes:
    """The finished file, UTF-8: the parts below each other."""
    return _PAGE.render(title=title, parts=parts, css=Markup(_CSS)).encode("utf-8", errors="replace")


def section(title: str, *parts: str) -> Markup:
    """Parts under a heading; sections can stand in sections."""
    return Markup(_SECTION.render(title=title, parts=parts))


def text(paragraph: str) -> Markup:
    """One paragraph; its line breaks are kept."""
    return Markup("<p>{}</p>").format(paragraph)


def facts(pairs: Mapping[str, Any]) -> Markup:
    """Names and values in two columns."""
    return Markup(_FACTS.render(pairs=[(name, _shown(value)) for name, value in pairs.items()]))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, marked: Collection[int] = ()) -> Markup:
    """A table. Numbers stand to the right in four digits, None is a dash, parts such as ``picture(...)`` stay what they are.

    The rows whose indices are in ``marked`` are coloured.
    """
    rows = [list(row) for row in rows]
    right = Markup(' class="number"')
    kinds = [right if any(_is_number(row[index]) for row in rows) else "" for index in range(len(columns))]
    decimals = [_decimals([row[index] for row in rows]) for index in range(len(columns))]
    cells = [
        ([(_shown(value, places), kind) for value, kind, places in zip(row, kinds, decimals)], index in marked)
        for index, row in enumerate(rows)
    ]
    return Markup(_TABLE.render(columns=list(zip(columns, kinds)), rows=cells))


def picture(image: Image.Image, caption: str = "", max_px: int = 512) -> Markup:
    """A picture within the file, scaled down to ``max_px`` on its longer side; the caption may have several lines.

    WebP, or PNG for a picture of few colours where that is not much larger: drawings keep every pixel.
    """
    image = image.copy()
    image.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    is_small = max(image.size) < min(_SMALL_PX, max_px)
    width, height = (side * (2 if is_small else 1) for side in image.size)
    alt = caption.strip().partition("\n")[0]
    figure = {"uri": _data_uri(image), "width": width, "height": height, "alt": alt, "is_small": is_small, "caption": caption}
    return Markup(_PICTURE.render(figure))


def gallery(figures: Iterable[str]) -> Markup:
    """Pictures or charts beside each other, as many as fit in a row."""
    return Markup(_GALLERY.render(figures=list(figures)))


def curves(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    points: Collection[str] = (),
    marks: Mapping[str, float] | None = None,
) -> Markup:
    """Curves of (x, y) over one pair of axes. What is not finite (or, with ``log_y``, not above 0) is left out.

    The series named in ``points`` are faint dots without a line; ``marks`` are upright lines, name -> x. A long series is
    thinned so that its peaks stay.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, pairs) in enumerate(series.items()):
            colour = _SERIES[index % _SERIES_COLOURS]
            pairs = [(x, y) for x, y in pairs if math.isfinite(y) and (y > 0 or not log_y)]
            if name in points:
                axes.plot(
                    *_split(_every_nth(pairs)), ".", color=colour, markersize=4, alpha=0.55, markeredgewidth=0, label=name
                )
            else:
                marker = "o" if len(pairs) <= 40 else ""
                axes.plot(*_split(_with_peaks(pairs)), marker=marker, color=colour, markersize=3.5, linewidth=1.6, label=name)
        for name, x in (marks or {}).items():
            axes.axvline(x, color=_INK, linewidth=0.9, linestyle=(0, (2, 2)), label=name)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        if all(float(x).is_integer() for pairs in series.values() for x, _ in pairs):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 2.5
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.02)
        if len(series) + len(marks or {}) > 1:
            axes.legend(fontsize=9)
        return _chart(title, figure)


def bars(title: str, values: Mapping[str, float], y_label: str) -> Markup:
    """One bar a name, from the left, so that long names can be read; ``y_label`` says what the lengths are."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.3 * max(1, len(values))), layout="constrained")
        axes = figure.add_subplot()
        drawn = axes.barh(range(len(values)), list(values.values()), color=_SERIES[0], height=0.7)
        axes.bar_label(drawn, [_shown(value) for value in values.values()], padding=4, fontsize=9, color=_INK)
        axes.set_yticks(range(len(values)), [_short(name) for name in values])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlabel(y_label)
        return _chart(title, figure)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _decimals(values: Sequence[Any]) -> int | None:
    """How many decimals the floats of a column get, so that the largest has four digits; None if they differ too much."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value) and value]
    if not sizes or max(sizes) > 1000 * min(sizes):
        return None
    return max(0, 3 - math.floor(math.log10(max(sizes))))


def _shown(value: Any, decimals: int | None = None) -> str:
    """A value as a reader wants it; what is markup already stays so."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and decimals is not None:
        return f"{value:,.{decimals}f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value) or "–"
    return value if isinstance(value, Markup) else str(value)


def _short(name: str, longest: int = 32) -> str:
    """A bar's name on one line."""
    line = " ".join(str(name).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _data_uri(image: Image.Image) -> str:
    if image.mode not in {"RGB", "RGBA", "L"}:
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    image.info = {}  # no camera data, no prompts, no colour profile: only what is seen
    lossy = _encoded(image, "WEBP", quality=85, method=4)
    is_drawing = image.getcolors(_DRAWING_COLOURS) is not None
    exact = _encoded(image, "PNG", compress_level=9) if is_drawing else None
    kind, data = ("png", exact) if exact and len(exact) <= LOSSLESS_BONUS * len(lossy) else ("webp", lossy)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _split(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _every_nth(pairs: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most ``MAX_POINTS`` of the points, evenly spaced and the last among them: how dense they lie stays true."""
    count = len(pairs)
    return [pairs[(index + 1) * count // MAX_POINTS - 1] for index in range(MAX_POINTS)] if count > MAX_POINTS else pairs


def _with_peaks(pairs: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most ``MAX_POINTS`` of the points: the lowest and the highest of each stretch, so that the line keeps its peaks."""
    if len(pairs) <= MAX_POINTS:
        return pairs
    stretches = MAX_POINTS // 2
    edges = [len(pairs) * index // stretches for index in range(stretches + 1)]
    kept: list[tuple[float, float]] = []
    for start, stop in itertools.pairwise(edges):
        order = sorted(range(start, stop), key=lambda index: pairs[index][1])
        kept += [pairs[index] for index in sorted({order[0], order[-1]})]
    return kept


def _chart(title: str, figure: Figure) -> Markup:
    """A matplotlib figure as SVG within HTML: colours of the page, no ids but those in use, coordinates of two decimals."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>| transform="rotate\(-0 [^"]*"', "", svg, flags=re.DOTALL
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(?<= [dxy]=")[^"]*', lambda found: re.sub(r"-?\d+\.\d+", _two_decimals, found[0]), svg)
    svg = svg.replace("'DejaVu Sans', sans-serif", "system-ui, sans-serif")
    for colour, css in _CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    head = re.match(r"<svg [^>]*>", svg)[0]
    view_box = re.search(r'viewBox="[^"]*"', head)[0]
    label = Markup.escape(title)
    svg = re.sub(r"\s*\n\s*", "\n", f'<svg {view_box} role="img" aria-label="{label}">{svg[len(head) :]}').strip()
    return Markup(_CHART.render(title=title, svg=Markup(svg)))


def _two_decimals(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
