"""Draw the idea of loraio: one base, ten adapters, swapped on the live model or merged into it.

usage: python scripts/docs_picture.py      writes loraio/docs/idea-light.svg and idea-dark.svg
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "loraio/docs"
WIDTH, HEIGHT = 920, 372
PALETTES = {
    "light": {"text": "#1f2933", "soft": "#5f6c7b", "line": "#b6c2cf", "card": "#f5f7fa", "weight": "#c9d6e3",
              "one": "#0f8a6d", "eight": "#c2452d", "other": "#8a97a6"},
    "dark": {"text": "#e6edf3", "soft": "#9aa7b4", "line": "#4a5663", "card": "#1c232b", "weight": "#3d4c5c",
             "one": "#3ecfa6", "eight": "#f08268", "other": "#77838f"},
}  # fmt: skip


class Drawing:
    """Lines of an SVG, in one palette."""

    def __init__(self, colours: dict[str, str]) -> None:
        self.colours = colours
        self.lines: list[str] = []

    def text(self, x: float, y: float, words: str, *, size: int = 13, colour: str = "text", bold: bool = False) -> None:
        """Add words, centred on x."""
        weight = ' font-weight="600"' if bold else ""
        self.lines.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{self.colours[colour]}"{weight}>{words}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str,
        *, line: str = "", radius: int = 3, opacity: float = 1.0,
    ) -> None:  # fmt: skip
        """Add a rectangle."""
        stroke = f' stroke="{self.colours[line]}" stroke-width="1.5"' if line else ""
        stroke += f' opacity="{opacity:.2f}"' if opacity < 1 else ""
        where = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"'
        self.lines.append(f'<rect {where} fill="{self.colours[fill]}"{stroke}/>')

    def arrow(self, path: str, *, both: bool = False) -> None:
        """Add an arrow along a path, with a head at its end or at both ends."""
        start = ' marker-start="url(#head)"' if both else ""
        self.lines.append(
            f'<path d="{path}" fill="none" stroke="{self.colours["soft"]}" stroke-width="2" '
            f'marker-end="url(#head)"{start}/>'
        )

    def matrix(self, x: float, y: float, size: float, cells: int, *, change: str = "") -> None:
        """Add a weight matrix as a square of cells; a change tints them like a matrix of rank 1."""
        step, b = size / cells, (0.9, 0.35, 0.7, 0.2, 1.0, 0.5)
        for row in range(cells):
            for column in range(cells):
                place = (x + column * step, y + row * step, step - 2, step - 2)
                self.box(*place, "weight", radius=1)
                if change:
                    self.box(*place, change, radius=1, opacity=b[row] * b[-1 - column])

    def factors(self, x: float, y: float, colour: str, *, size: float) -> None:
        """Add a tall B and a wide A."""
        thin = size / 4
        self.box(x, y, thin, size, colour, radius=1)
        self.box(x + thin + 4, y, size, thin, colour, radius=1)

    def svg(self) -> str:
        """Return the whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" text-anchor="middle" '
            'role="img" aria-label="One base network, ten small adapters, swapped on the live model or merged into it">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 1 L9 5 L0 9 z" fill="{self.colours["soft"]}"/></marker></defs>'
        )
        return "\n".join([head, marker, *self.lines, "</svg>", ""])


def drawn(colours: dict[str, str]) -> str:
    """Return the picture in one palette."""
    made = Drawing(colours)
    made.text(125, 34, "one base network", size=17, bold=True)
    made.matrix(55, 92, 140, 10)
    made.text(125, 262, "W, trained once, then frozen")
    made.text(125, 282, "454 kB", colour="soft")

    made.text(405, 34, "ten adapters", size=17, bold=True)
    for digit in range(10):
        colour = {1: "one", 8: "eight"}.get(digit, "other")
        x, y = 288 + 120 * (digit % 2), 56 + 38 * (digit // 2)
        made.box(x, y, 114, 32, "card", line="line" if colour == "other" else colour, radius=6)
        made.factors(x + 12, y + 6, colour, size=20)
        made.text(x + 76, y + 21, f"digit {digit}", colour="soft" if colour == "other" else colour)
    made.text(405, 262, "B and A, trained for one digit each")
    made.text(405, 282, "20 kB each", colour="soft")
    made.arrow("M 212 150 L 270 150")
    made.text(241, 138, "train", colour="soft")

    made.text(745, 34, "swap them on the live model", size=17, bold=True)
    made.matrix(615, 56, 72, 6)
    made.text(704, 97, "+", size=20, colour="soft")
    for place, (digit, colour) in enumerate(((1, "one"), (8, "eight"))):
        made.box(720 + 112 * place, 74, 72, 34, "card", line=colour, radius=6)
        made.factors(729 + 112 * place, 81, colour, size=20)
        made.text(776 + 112 * place, 96, f"{digit}", colour=colour)
    made.arrow("M 797 91 L 827 91", both=True)
    made.text(745, 152, "attach, swap, switch off, detach:", size=12, colour="soft")
    made.text(745, 170, "the base comes back, bit for bit", size=12, colour="soft")
    made.arrow("M 535 128 C 565 128, 570 92, 600 92")

    made.text(745, 226, "or merge one for good", size=17, bold=True)
    made.matrix(615, 248, 72, 6, change="one")
    made.text(800, 282, "W + B A", size=19)
    made.text(800, 304, "rounded once, proven,", size=12, colour="soft")
    made.text(800, 320, "and reversible", size=12, colour="soft")
    made.arrow("M 535 190 C 570 190, 560 284, 600 284")
    sentence = "train makes an adapter, a file stores it, attach or merge puts it into the base, verify proves it"
    made.text(460, 356, sentence, colour="soft")
    return made.svg()


if __name__ == "__main__":
    for name, colours in PALETTES.items():
        (FOLDER / f"idea-{name}.svg").write_text(drawn(colours))
