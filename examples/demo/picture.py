"""Draw one run of the demo as an SVG: what a cold start, a checkpoint and a restore took, to one scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WIDTH, LEFT, ROW, TOP = 760, 150, 58, 34
COLOURS = {"load": "#b9c2cc", "answer": "#7fb069", "work": "#4f7cac", "frozen": "#d1495b"}


@dataclass(frozen=True)
class Part:
    """A stretch of one row: seconds, what it was, and its kind (a key of `COLOURS`)."""

    seconds: float
    text: str
    kind: str


def draw(rows: list[tuple[str, list[Part]]], path: Path) -> None:
    """Write the picture; each row has a title and parts that follow each other."""
    longest = max(sum(part.seconds for part in parts) for _, parts in rows)
    scale = (WIDTH - LEFT - 90) / longest
    height = TOP + ROW * len(rows) + 14
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" style="font:13px sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" fill="#666">seconds from the start of the container to the first answer</text>',
    ]
    for number, (title, parts) in enumerate(rows):
        y = TOP + ROW * number
        body.append(f'<text x="{LEFT - 12}" y="{y + 20}" text-anchor="end" fill="#222">{title}</text>')
        x = float(LEFT)
        for part in parts:
            width = max(part.seconds * scale, 1.0)
            colour = COLOURS[part.kind]
            body.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="28" fill="{colour}"/>')
            x += width
        total = sum(part.seconds for part in parts)
        body.append(f'<text x="{x + 8:.1f}" y="{y + 20}" font-weight="bold" fill="#222">{total:.2f} s</text>')
        legend = ", ".join(f"{part.text} {part.seconds:.2f}" for part in parts)
        body.append(f'<text x="{LEFT}" y="{y + 44}" style="font-size:11px" fill="#666">{legend}</text>')
    path.write_text("\n".join([*body, "</svg>"]) + "\n")
