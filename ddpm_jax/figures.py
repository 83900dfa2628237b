"""Pictures with words beside them: sheets of images with labelled rows and columns, and plots; uint8 [H W 3].

Drawn by Matplotlib without its global state, so that a notebook's own figures are left alone.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ddpm_jax import images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 100
_FONT = 8  # points; a letter is about 6 pixels wide and a line 14 high
_LETTER, _LINE = 6.2, 14
_CELL = 96  # pixels: what a small image is enlarged to, or more where its label is wider ...
_GAP = 6  # pixels between the images
_SIDE = 1500  # ... as long as the sheet fits on a screen


class Panel(NamedTuple):
    """One plot: named curves over one x-axis."""

    title: str
    x_label: str
    x: np.ndarray  # [N]
    curves: Mapping[str, np.ndarray]  # [N] each
    log: bool = False  # the y-axis
    style: str = "lines"  # or "nested": thick to thin, for curves that hide one another; or "dots", without the zeros


def sheet(pictures: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str = "") -> np.ndarray:
    """A table of images with a label a row and a label a column.

    Args:
        pictures: uint8 [R C H W channels]; each image keeps its pixels, enlarged by a whole factor.
        rows: R labels.
        columns: C labels, of one line or more.
        title: a line above; "" is none.
    """
    count = pictures.shape[0] * pictures.shape[1]
    letters = max(len(line) for label in columns for line in label.split("\n"))
    scale = _scale(pictures.shape, int(_LETTER * (letters + 1)))
    flat = pictures.reshape(count, *pictures.shape[2:])
    canvas = images.grid(flat, columns=pictures.shape[1], padding=_GAP, scale=scale)
    canvas = np.broadcast_to(canvas, (*canvas.shape[:2], 3))  # a colour map would move some of the grays
    height, width = canvas.shape[:2]
    left = int(10 + _LETTER * max(map(len, rows), default=0))
    top = 6 + _LINE * (max(label.count("\n") + 1 for label in columns) + bool(title))
    total_width = max(left + width, int(_LETTER * len(title)) + 12) + 4
    figure = _figure(total_width, top + height + 4)
    axes = figure.add_axes(
        (left / total_width, 4 / (top + height + 4), width / total_width, height / (top + height + 4))
    )
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks((np.arange(len(rows)) + 0.5) * height / len(rows), rows)
    axes.set_xticks((np.arange(len(columns)) + 0.5) * width / len(columns), columns)
    axes.tick_params(length=0, labelsize=_FONT, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    if title:
        figure.text(6 / total_width, 1 - 4 / (top + height + 4), title, fontsize=_FONT, va="top")
    return _pixels(figure)


def plots(panels: Sequence[Panel]) -> np.ndarray:
    """Plots side by side."""
    figure = _figure(420 * len(panels), 300)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for j, (name, curve) in enumerate(panel.curves.items()):
            if panel.style == "dots":
                axes.plot(panel.x, np.where(curve == 0, np.nan, curve), ".", label=name, markersize=2)
            else:
                nested = 1.5 * (len(panel.curves) - 1 - j) if panel.style == "nested" else 0
                axes.plot(panel.x, curve, label=name, linewidth=1 + nested)
        if panel.log:
            axes.set_yscale("log")
        axes.set_title(panel.title, fontsize=_FONT)
        axes.set_xlabel(panel.x_label, fontsize=_FONT)
        axes.tick_params(labelsize=_FONT)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=_FONT - 1)
    figure.tight_layout()
    return _pixels(figure)


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [H W 3] below one another, on white."""
    width = max(picture.shape[1] for picture in pictures)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures])


def _scale(shape: tuple[int, ...], label_width: int) -> int:
    """By how much the images [R C H W ...] of a sheet are enlarged."""
    rows, columns, height, width = shape[:4]
    readable = max(-(-_CELL // height), -(-label_width // width))
    return max(1, min(readable, _SIDE // (rows * height), _SIDE // (columns * width)))


def _figure(width: int, height: int) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)


def _pixels(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])
