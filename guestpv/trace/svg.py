"""A little SVG: text, boxes and arrows in a few named colours, light or dark as the reader has it."""

from __future__ import annotations

from html import escape

COLOURS = {
    # name: (light, dark)
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "quiet": ("#656d76", "#8d96a0"),
    "line": ("#d0d7de", "#30363d"),
    "driver": ("#0969da", "#58a6ff"),
    "device": ("#bc4c00", "#f0883e"),
    "free": ("#f6f8fa", "#161b22"),
    "placed": ("#d6ebff", "#112d4e"),
    "with": ("#ffe3cc", "#4a2408"),
    "used": ("#d2f4da", "#11381f"),
}
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
SANS = "-apple-system,'Segoe UI','Noto Sans',Helvetica,Arial,'DejaVu Sans',sans-serif"


class Drawing:
    """Collects elements; ``svg`` gives the document. Lengths are in pixels at natural size."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._back: list[str] = []
        self._front: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str = "ink",
        size: float = 12.5,
        bold: bool = False,
        sans: bool = False,
        anchor: str = "start",
    ) -> None:
        """One line of text whose baseline is at ``y``."""
        classes = f"{'s' if sans else 'm'} f-{colour}" + (" b" if bold else "")
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._front.append(
            f'<text class="{classes}" x="{x:g}" y="{y:g}" font-size="{size:g}"{where}'
            f' xml:space="preserve">{escape(text, quote=False)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "free",
        stroke: str = "line",
        radius: float = 0,
        dashed: bool = False,
    ) -> None:
        """A filled rectangle behind everything that is not a rectangle."""
        more = ' stroke-dasharray="4 3"' if dashed else ""
        self._back.append(
            f'<rect class="f-{fill} s-{stroke}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            f' rx="{radius:g}"{more}/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A rectangle without a border."""
        self._back.append(
            f'<rect class="f-{colour}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'
        )

    def arrow(self, path: str, colour: str, *, dashed: bool = False) -> None:
        """A curve with a head at its end; ``path`` is SVG path data."""
        more = ' stroke-dasharray="3 3"' if dashed else ""
        self._front.append(
            f'<path class="l-{colour}" d="{path}" fill="none" stroke-width="1.5"'
            f' marker-end="url(#to-{colour})"{more}/>'
        )

    def svg(self, height: float, title: str, description: str) -> str:
        """The document, with a title and a description for those who do not see it."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height:g}"'
            f' width="{self.width}" height="{height:g}" role="img" aria-labelledby="title desc">'
        )
        markers = "".join(
            f'<marker id="to-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path class="f-{name}" d="M0 0.5 8 4 0 7.5z"/></marker>'
            for name in ("driver", "device", "quiet")
        )
        parts = [
            head,
            f'<title id="title">{escape(title, quote=False)}</title>',
            f'<desc id="desc">{escape(description, quote=False)}</desc>',
            f"<style>{_style()}</style>",
            f"<defs>{markers}</defs>",
            f'<rect class="f-paper" width="{self.width}" height="{height:g}" rx="8"/>',
            *self._back,
            *self._front,
            "</svg>",
        ]
        return "\n".join(parts) + "\n"


def _style() -> str:
    fonts = f".m{{font-family:{MONO}}}.s{{font-family:{SANS}}}.b{{font-weight:600}}"
    light, dark = ("".join(_rules(mode)) for mode in (0, 1))
    return f"{fonts}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _rules(mode: int) -> list[str]:
    return [
        f".f-{name}{{fill:{pair[mode]}}}.s-{name},.l-{name}{{stroke:{pair[mode]}}}"
        for name, pair in COLOURS.items()
    ]
