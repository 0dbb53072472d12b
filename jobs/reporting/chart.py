"""Line charts and bars as inline SVG: readable without scripts, with values under the pointer.

Colours and fonts come from the page's style sheet, so a chart follows the light and dark theme.
"""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 236
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
MAX_POINTS = 240
LOG_RATIO = 60  # a span beyond this is drawn on a logarithmic axis


class Series(NamedTuple):
    """A named line; NaN values are left out. `colour` is 1..6 of the style sheet."""

    name: str
    values: Sequence[float]
    colour: int


class _Binned(NamedTuple):
    """Consecutive points merged: mean line with the range of what was merged."""

    xs: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]
    merged: bool


class _Scale(NamedTuple):
    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """Vertical pixel of `value`."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = (at - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str,
    note: str,
    xs: Sequence[float],
    series: Sequence[Series],
    *,
    x_label: str = "step",
    top: float | None = None,
    from_zero: bool = False,
) -> str:
    """A titled chart of lines over `xs`, as an HTML figure; empty text when there is no value.

    Args:
        note: one sentence under the title.
        top: upper end of the axis; default: what the values need.
        from_zero: start the axis at zero, whatever the values are.
    """
    binned = [(line, _bin(xs, line.values)) for line in series]
    binned = [(line, points) for line, points in binned if points.xs]
    if not binned:
        return ""
    scale = _scale([points for _line, points in binned], top, from_zero)
    x_low = min(points.xs[0] for _line, points in binned)
    x_high = max(points.xs[-1] for _line, points in binned)
    span = (x_high - x_low) or 1.0

    def place_x(x: float) -> float:
        return LEFT + (x - x_low) / span * (WIDTH - LEFT - RIGHT)

    parts = [_grid(scale, x_low, x_high, place_x, x_label)]
    hover: list[dict[str, object]] = []
    for line, points in binned:
        parts.append(_polyline(line, points, scale, place_x))
        hover.append(
            {
                "name": line.name,
                "colour": line.colour,
                "x": [round(x, 3) for x in points.xs],
                "px": [round(place_x(x), 1) for x in points.xs],
                "py": [round(scale.place(y), 1) for y in points.means],
                "text": [short(value) for value in points.means],
            }
        )
    means = binned[0][1].means
    label = f"{title}: from {short(means[0])} to {short(means[-1])}"
    data = escape(json.dumps({"xLabel": x_label, "series": hover}), quote=True)
    return (
        f'<figure class="chart" data-chart="{data}"><figcaption><b>{escape(title)}</b>'
        f"<span>{escape(note)}</span>{_legend([line for line, _points in binned])}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'</svg><div class="tip" hidden></div></figure>'
    )


def split_bar(title: str, note: str, shares: Sequence[tuple[str, float, str, int]]) -> str:
    """One bar divided by (name, amount, amount in words, colour), as an HTML figure."""
    total = sum(amount for _name, amount, _words, _colour in shares)
    if not total > 0:
        return ""
    cells = "".join(
        f'<i class="c{colour}" style="width:{100 * amount / total:.2f}%"></i>'
        for _name, amount, _words, colour in shares
    )
    rows = "".join(
        f'<tr><td><span class="dot c{colour}"></span>{escape(name)}</td>'
        f"<td>{escape(words)}</td><td>{100 * amount / total:.1f}&nbsp;%</td></tr>"
        for name, amount, words, colour in shares
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span>{escape(note)}</span>'
        f'</figcaption><div class="split">{cells}</div><table class="plain">{rows}</table></figure>'
    )


def short(value: float) -> str:
    """A number in at most four significant digits."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _bin(xs: Sequence[float], values: Sequence[float]) -> _Binned:
    pairs = [(x, y) for x, y in zip(xs, values, strict=True) if math.isfinite(y)]
    size = max(1, math.ceil(len(pairs) / MAX_POINTS))
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    columns = [[y for _x, y in group] for group in groups]
    return _Binned(
        xs=[sum(x for x, _y in group) / len(group) for group in groups],
        means=[sum(column) / len(column) for column in columns],
        lows=[min(column) for column in columns],
        highs=[max(column) for column in columns],
        merged=size > 1,
    )


def _scale(lines: list[_Binned], top: float | None, from_zero: bool) -> _Scale:
    low = min(min(points.lows) for points in lines)
    high = max(max(points.highs) for points in lines) if top is None else top
    linear = from_zero or top is not None
    if low > 0 and high / low > LOG_RATIO and not linear:
        return _Scale(low / 1.15, high * 1.15, log=True)
    if low >= 0 and (low < 0.6 * high or linear):
        low = 0.0
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return _Scale(
        low if low == 0 else low - margin, high if top is not None else high + margin, False
    )


def _ticks(scale: _Scale) -> list[float]:
    if scale.log:
        exponents = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        factors = (1,) if len(exponents) > 3 else (1, 2, 5)
        return [f * 10.0**e for e in exponents for f in factors if _inside(scale, f * 10.0**e)]
    rough = (scale.high - scale.low) / 5
    base = 10 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough)
    first = math.ceil(scale.low / step)
    count = math.floor(scale.high / step + 1e-9) - first + 1
    return [(first + number) * step for number in range(count)]


def _inside(scale: _Scale, value: float) -> bool:
    return scale.low <= value <= scale.high


def _grid(
    scale: _Scale, x_low: float, x_high: float, place_x: Callable[[float], float], x_label: str
) -> str:
    parts = []
    across = f'x1="{LEFT}" x2="{WIDTH - RIGHT}"'
    for tick in _ticks(scale):
        y = scale.place(tick)
        parts.append(f'<line class="grid" {across} y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{short(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    for tick in _ticks(_Scale(x_low, x_high if x_high > x_low else x_low + 1, False)):
        x = place_x(tick)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17}">{tick:,.0f}</text>')
    parts.append(f'<line class="axis" {across} y1="{bottom}" y2="{bottom}"/>')
    right = f'class="tick end" x="{WIDTH - RIGHT}"'
    parts.append(f'<text {right} y="{HEIGHT - 3}">{escape(x_label)}</text>')
    if scale.log:
        parts.append(f'<text {right} y="{TOP + 8}">logarithmic axis</text>')
    return "".join(parts)


def _polyline(
    line: Series, points: _Binned, scale: _Scale, place_x: Callable[[float], float]
) -> str:
    at = [place_x(x) for x in points.xs]
    path = " ".join(f"{x:.1f},{scale.place(y):.1f}" for x, y in zip(at, points.means, strict=True))
    if len(at) == 1:
        y = scale.place(points.means[0])
        return f'<circle class="c{line.colour}" cx="{at[0]:.1f}" cy="{y:.1f}" r="3.5"/>'
    band = ""
    if points.merged:
        upper = [f"{x:.1f},{scale.place(y):.1f}" for x, y in zip(at, points.highs, strict=True)]
        lower = [f"{x:.1f},{scale.place(y):.1f}" for x, y in zip(at, points.lows, strict=True)]
        band = f'<polygon class="band c{line.colour}" points="{" ".join(upper + lower[::-1])}"/>'
    return f'{band}<polyline class="line c{line.colour}" points="{path}"/>'


def _legend(lines: list[Series]) -> str:
    if len(lines) < 2:
        return ""
    return (
        '<span class="legend">'
        + "".join(
            f'<em><span class="dot c{line.colour}"></span>{escape(line.name)}</em>'
            for line in lines
        )
        + "</span>"
    )
