"""Draws docs/images/segments.png: the stages of Wan-Animate, from the list that the executor runs.

    python docs/segments.py

A box is a stage, with the weights that it needs; on its left what the call gives it, on its right what it takes from
other stages (arrow in) and what it makes (arrow out). The frame is what is replayed for each segment, the coloured line
on its left what a segment hands to the next. Nothing here knows the stages' names: another list draws another picture.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from jdit.pipeline import executor, wan_animate  # noqa: E402
from jdit.pipeline.executor import Stage  # noqa: E402

ROW, GAP, LANE, BOX, GIVEN = 19, 20, 15, 316, 128  # pixels: of a value, between boxes, of a line, of a box, on the left
INK, FAINT, LOOP, FRAME = "#222222", "#777777", "#c8321e", "#f3f6fb"
FILLS = ("#cfe3f7", "#d9efd0", "#fbe3c4", "#e7dcf3", "#f5d5da")  # a colour for each set of weights
LINES = ("#2b6cb0", "#3f8f3a", "#b7791f", "#7b4fa3", "#c0567a", "#2a8f8f")


class Wire(NamedTuple):
    """A value from the stage that makes it to those that take it, by number."""

    name: str
    maker: int
    takers: tuple[int, ...]


def wires(stages: Sequence[Stage]) -> list[Wire]:
    """What stages take from those before them."""
    out: dict[tuple[str, int], list[int]] = {}
    for n, stage in enumerate(stages):
        for name in stage.reads:
            made = [m for m in range(n) if name in stages[m].writes]
            if made:
                out.setdefault((name, made[-1]), []).append(n)
    for n, stage in enumerate(stages):
        for name in stage.writes:
            if not any(name in later.writes for later in stages[n + 1 :]):
                out.setdefault((name, n), [])  # a result, even if nobody takes it
    return [Wire(*key, tuple(takers)) for key, takers in sorted(out.items(), key=lambda item: item[0][1])]


def lanes(found: Sequence[Wire]) -> dict[Wire, int]:
    """Which vertical line each wire takes, so that none covers another: short ones next to the boxes."""
    out: dict[Wire, int] = {}
    for wire in sorted((w for w in found if w.takers), key=lambda w: w.takers[-1] - w.maker):
        span = lambda w: (w.maker, w.takers[-1])
        busy = {lane for w, lane in out.items() if span(w)[0] <= span(wire)[1] and span(wire)[0] <= span(w)[1]}
        out[wire] = next(n for n in range(len(out) + 1) if n not in busy)
    return out


def draw(stages: Sequence[Stage]) -> Image.Image:
    found = wires(stages)
    lane = lanes(found)
    block = next([s for s in b] for _, b in executor.blocks(stages) if b[0].repeats)
    inside = [n for n, s in enumerate(stages) if s in block]
    names = {n for s in block for n in (*s.reads, *s.writes)}
    carried = tuple(executor._carried(block, {n: n for n in names}))
    takes = [[w for w in found if n in w.takers] for n in range(len(stages))]
    makes = [[w for w in found if n == w.maker] for n in range(len(stages))]
    given = [[r for r in s.reads if r not in {w.name for w in takes[n]} and not (n in inside and r in carried)]
             for n, s in enumerate(stages)]  # fmt: skip
    loops = [[name for name in carried if n in inside and name in s.reads] for n, s in enumerate(stages)]
    given = [[", ".join(g[i : i + 2]) for i in range(0, len(g), 2)] for g in given]
    rows = [max(2, len(takes[n]) + len(makes[n]), len(given[n]) + len(loops[n]) + (0 if n not in inside else 1))
            for n in range(len(stages))]  # fmt: skip
    tops, y = [], 26
    for n, count in enumerate(rows):
        y += 22 if n == inside[0] else 14 if n == inside[-1] + 1 else 0
        tops.append(y)
        y += count * ROW + 10 + GAP
    left, right = GIVEN + 64, GIVEN + 64 + BOX
    width = right + 40 + LANE * (max(lane.values()) + 1)
    picture = Image.new("RGB", (width, y + 2), "white")
    pen, font, bold = ImageDraw.Draw(picture), ImageFont.load_default(13), ImageFont.load_default(15)
    at = lambda n, row: tops[n] + 5 + ROW * row + ROW // 2

    first, last = tops[inside[0]] - 26, tops[inside[-1]] + rows[inside[-1]] * ROW + 22
    pen.rounded_rectangle((GIVEN + 20, first, width - 6, last), 10, fill=FRAME, outline=FAINT)
    pen.text((left, first + 5), f"replayed for each {block[0].repeats}", FAINT, font)

    def arrow(points: list[tuple[int, int]], colour: str):
        """A line that ends in a head, to the right or to the left."""
        pen.line(points, colour, 2)
        (x, y), back = points[-1], 7 if points[-1][0] < points[-2][0] else -7
        pen.polygon([(x, y), (x + back, y - 4), (x + back, y + 4)], colour)

    port: dict[tuple[int, str, bool], int] = {}
    for n in range(len(stages)):
        for row, (wire, out) in enumerate([(w, False) for w in takes[n]] + [(w, True) for w in makes[n]]):
            port[n, wire.name, out] = at(n, row)
    for i, wire in enumerate(sorted(lane, key=lambda w: lane[w])):
        x, colour, start = right + 26 + LANE * lane[wire], LINES[i % len(LINES)], port[wire.maker, wire.name, True]
        for taker in wire.takers:
            end = port[taker, wire.name, False]
            arrow([(right, start), (x, start), (x, end), (right + 1, end)], colour)
    kinds = list(dict.fromkeys(s.weights for s in stages if s.weights))
    for n, stage in enumerate(stages):
        fill = FILLS[kinds.index(stage.weights) % len(FILLS)] if stage.weights else "white"
        box = (left, tops[n], right, tops[n] + rows[n] * ROW + 10)
        pen.rounded_rectangle(box, 6, fill=fill, outline=INK)
        pen.text((left + 10, at(n, 0)), stage.name, INK, bold, anchor="lm")
        pen.text((left + 10, at(n, 1)), ", ".join(stage.weights) or "on the host", FAINT, font, anchor="lm")
        for wire, out in [(w, False) for w in takes[n]] + [(w, True) for w in makes[n]]:
            pen.text((right - 10, port[n, wire.name, out]), wire.name, INK if out else FAINT, font, anchor="rm")
            if out and not wire.takers and not (n in inside and wire.name in carried):
                arrow([(right, port[n, wire.name, out]), (right + 24, port[n, wire.name, out])], INK)
        for row, name in enumerate(given[n]):
            pen.text((GIVEN + 14, at(n, row)), name, FAINT, font, anchor="rm")
            arrow([(GIVEN + 18, at(n, row)), (left - 1, at(n, row))], "#aaaaaa")
    for row, name in enumerate(carried):
        x = left - 14 - 12 * row
        ends = [at(n, rows[n] - 1 - loops[n].index(name)) for n in inside if name in loops[n]]
        made = next(n for n in reversed(inside) if name in stages[n].writes)
        low = tops[made] + rows[made] * ROW + 10
        turn = low + 6
        pen.line([(right - 24, low), (right - 24, turn), (x, turn), (x, ends[0])], LOOP, 2)
        for y in ends:
            arrow([(x, y), (left - 1, y)], LOOP)
            pen.text((left + 10, y), f"{name} of the {block[0].repeats} before", LOOP, font, anchor="lm")
    return picture


def main():
    path = ROOT / "docs" / "images" / "segments.png"
    draw(wan_animate.stages()).quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
