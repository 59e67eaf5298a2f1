"""Draw docs/images/data_flow.svg, the data flow of stages 1 to 3.

    python docs/make_diagram.py

The positions are fixed, so the file is a pure function of this script; a test compares the two.
"""

from html import escape
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "images" / "data_flow.svg"
WIDTH, HEIGHT = 1180, 330
BOX_WIDTH, BOX_HEIGHT = 132, 58
TEXT = 'font-family="Helvetica, Arial, sans-serif"'


class Box(NamedTuple):
    """A step: title, room of the package, left and top edge in pixels."""

    title: str
    room: str
    x: int
    y: int


class Stage(NamedTuple):
    """A shaded area: title, left, top, width and height in pixels, fill color."""

    title: str
    x: int
    y: int
    width: int
    height: int
    color: str


STAGES = (
    Stage("Stage 1: SFT", 14, 14, 316, 110, "#e8f1fb"),
    Stage("Stage 2: rollout", 14, 142, 640, 110, "#eaf6ea"),
    Stage("Stage 3: EGSPO", 670, 14, 496, 238, "#fdf0e4"),
)
BOXES = {
    "demonstrations": Box("demonstrations", "data", 30, 48),
    "expert": Box("expert batch", "data", 182, 48),
    "problems": Box("problems", "data", 30, 176),
    "sample": Box("sample G answers", "rollout", 186, 176),
    "grade": Box("grade", "rewards", 342, 176),
    "score": Box("log-probs, entropy", "rollout", 498, 176),
    "advantages": Box("advantages A_t", "ops", 686, 176),
    "gate": Box("gate: tau, g_t", "ops", 854, 176),
    "loss": Box("loss", "ops/objective.py", 854, 48),
    "step": Box("optimizer step", "Lightning", 1018, 48),
}
ARROWS = (
    ("demonstrations", "expert"),
    ("expert", "loss"),
    ("problems", "sample"),
    ("sample", "grade"),
    ("grade", "score"),
    ("score", "advantages"),
    ("advantages", "gate"),
    ("gate", "loss"),
    ("loss", "step"),
)


def main() -> None:
    FILE.write_text(drawing(), encoding="utf-8")
    print(FILE)


def drawing() -> str:
    """Return the diagram as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *(_stage(stage) for stage in STAGES),
        *(_arrow(BOXES[start], BOXES[end]) for start, end in ARROWS),
        _weights(BOXES["step"], BOXES["sample"]),
        *(_box(box) for box in BOXES.values()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(words: str, x: float, y: float, size: int, color: str, anchor: str = "middle", weight: str = "normal") -> str:
    style = f'{TEXT} font-size="{size}" font-weight="{weight}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def _stage(stage: Stage) -> str:
    area = (
        f'<rect x="{stage.x}" y="{stage.y}" width="{stage.width}" height="{stage.height}" rx="10" '
        f'fill="{stage.color}"/>'
    )
    return area + "\n" + _text(stage.title, stage.x + 14, stage.y + 23, 14, "#333", "start", "bold")


def _box(box: Box) -> str:
    middle = box.x + BOX_WIDTH / 2
    outline = (
        f'<rect x="{box.x}" y="{box.y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="#ffffff" '
        'stroke="#444" stroke-width="1.2"/>'
    )
    title = _text(box.title, middle, box.y + 25, 13, "#111")
    return "\n".join([outline, title, _text(box.room, middle, box.y + 45, 12, "#777")])


def _arrow(start: Box, end: Box) -> str:
    if start.x == end.x:  # upwards
        x = start.x + BOX_WIDTH / 2
        return _line(f"M{x:g},{start.y} L{x:g},{end.y + BOX_HEIGHT}")
    y = start.y + BOX_HEIGHT / 2
    return _line(f"M{start.x + BOX_WIDTH},{y:g} L{end.x},{end.y + BOX_HEIGHT / 2:g}")


def _weights(step: Box, sample: Box) -> str:
    """The arrow from the new weights back to sampling, below all boxes."""
    right, left, bottom = step.x + BOX_WIDTH / 2, sample.x + BOX_WIDTH / 2, 286
    path = f"M{right:g},{step.y + BOX_HEIGHT} L{right:g},{bottom} L{left:g},{bottom} L{left:g},{sample.y + BOX_HEIGHT}"
    return _line(path, dashed=True) + "\n" + _text("weights", (left + right) / 2, bottom + 20, 13, "#444")


def _line(path: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="#444" stroke-width="1.4"{dashes} marker-end="url(#tip)"/>'


if __name__ == "__main__":
    main()
