"""Accuracy against labels as an SVG picture: lines with bands on a logarithmic axis, references as dashed lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from label_arms import ARMS, BOUND, DRAWN, START

WIDTH, HEIGHT = 1000, 540
LEFT, RIGHT, TOP, BOTTOM = 70, 370, 48, 60  # margins; the legend is in the right one
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
REFERENCES = (BOUND, "majority", START)  # one accuracy, whatever the labels
MOST = len(COLOURS)


def picture(results: Mapping[str, Any], arms: Sequence[str] | None = None) -> str:
    """Return the picture.

    Args:
        results: of ``label_summary.summarise``.
        arms: to draw; by default those that decide, and the best uniform arm where it is none of them. Those without
            a curve are left out.
    """
    curves = results["curves"]
    best = (results["best_uniform"] or {}).get("arm")
    chosen = list(arms or dict.fromkeys([*DRAWN, *([best] if best else [])]))
    lines = {arm: curves[arm]["points"] for arm in chosen if arm in curves and curves[arm]["points"][0]["budget"]}
    lines = dict(list(lines.items())[:MOST])
    flat = {arm: curves[arm]["points"][0] for arm in REFERENCES if arm in curves and curves[arm]["points"]}
    everything = [point for points in lines.values() for point in points]
    low = min([p["low"] for p in everything] + [p["value"] for p in flat.values()], default=0.0)
    high = max([p["high"] for p in everything] + [p["value"] for p in flat.values()], default=1.0)
    axes = Axes(results["budgets"], low, high)
    body = [axes.draw()]
    body += [axes.level(point["value"]) for point in flat.values()]
    for colour, points in zip(COLOURS, lines.values(), strict=False):
        body.append(axes.band(points, colour))
    for colour, points in zip(COLOURS, lines.values(), strict=False):
        body.append(axes.line(points, colour))
    entries = [(ARMS[arm].words, colour, False) for colour, arm in zip(COLOURS, lines, strict=False)]
    entries += [(_reference(arm, point), "#666666", True) for arm, point in flat.items()]
    body.append(_legend(entries))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222222">',
            "<title>Accuracy against labels</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            _text(LEFT, 26, "Reasoning test prompts answered right, by number of labels (mean and 95% band)", size=15),
            *body,
            "</svg>\n",
        ]
    )


def _reference(arm: str, point: Mapping[str, Any]) -> str:
    labels = f" ({point['labels']:.0f} labels)" if point["labels"] else ""
    return f"{ARMS[arm].words}{labels}: {point['value']:.0%}"


class Axes:
    """Where budgets and accuracies lie in the picture."""

    def __init__(self, budgets: Sequence[int], low: float, high: float) -> None:
        self.budgets = budgets
        self.step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 8 or step == 0.5)
        self.low = math.floor(low / self.step + 1e-9) * self.step
        self.high = max(math.ceil(high / self.step - 1e-9) * self.step, self.low + self.step)

    def x(self, budget: float) -> float:
        """Return the place of a number of labels, on a logarithmic axis."""
        span = math.log2(self.budgets[-1] / self.budgets[0]) or 1.0
        return LEFT + 16 + math.log2(budget / self.budgets[0]) / span * (WIDTH - LEFT - RIGHT - 32)

    def y(self, accuracy: float) -> float:
        """Return the place of an accuracy."""
        return HEIGHT - BOTTOM - (accuracy - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> str:
        """Return grid, ticks and the names of the axes."""
        parts, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
        for number in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + number * self.step
            y = self.y(value)
            parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e4e4e4"/>')
            parts.append(_text(LEFT - 8, y + 4, f"{value:.0%}", anchor="end"))
        for budget in self.budgets:
            x = self.x(budget)
            parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="#222222"/>')
            parts.append(_text(x, bottom + 20, str(budget), anchor="middle"))
        parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222222"/>')
        parts.append(_text((LEFT + right) / 2, bottom + 44, "labels (logarithmic)", anchor="middle"))
        middle = (TOP + bottom) / 2
        turned = f'transform="rotate(-90 18 {middle:.0f})"'
        parts.append(_text(18, middle, "accuracy, greedy", anchor="middle", more=turned))
        return "\n".join(parts)

    def level(self, accuracy: float) -> str:
        """Return a dashed line across."""
        y, right = self.y(accuracy), WIDTH - RIGHT
        line = f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#666666" stroke-dasharray="6 4"/>'
        return line + _text(right + 4, y + 4, f"{accuracy:.0%}", size=11)

    def band(self, points: Sequence[Mapping[str, Any]], colour: str) -> str:
        """Return the intervals around a curve as an area."""
        edge = [(p["budget"], p["high"]) for p in points] + [(p["budget"], p["low"]) for p in reversed(points)]
        return f'<polygon points="{self._places(edge)}" fill="{colour}" fill-opacity="0.10"/>'

    def line(self, points: Sequence[Mapping[str, Any]], colour: str) -> str:
        """Return a curve with a dot at every budget."""
        places = [(p["budget"], p["value"]) for p in points]
        dots = "".join(f'<circle cx="{self.x(b):.1f}" cy="{self.y(v):.1f}" r="3.5"/>' for b, v in places)
        path = f'<polyline points="{self._places(places)}" fill="none" stroke="{colour}" stroke-width="2.2"/>'
        return f'<g fill="{colour}">{path}{dots}</g>'

    def _places(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(budget):.1f},{self.y(value):.1f}" for budget, value in points)


def _legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    parts, x = [], WIDTH - RIGHT + 44
    for row, (words, colour, dashed) in enumerate(entries):
        y = TOP + 14 + 24 * row
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 28}" y2="{y}" stroke="{colour}" stroke-width="2.2"{dash}/>')
        parts.append(_text(x + 36, y + 4, words))
    return "\n".join(parts)


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 13, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>{escape(words)}</text>'
