"""Sheets hold the images' own pixels where the labels say; plots and stacks have the sizes they must."""

import numpy as np
import pytest

from ddpm_jax import figures, images


def drawn(rows, columns, channels=1, size=8):
    return np.random.default_rng(0).integers(0, 256, (rows, columns, size, size, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("title", ["", "a title that is longer than one row of pictures of this size is wide"])
def test_a_sheet_holds_every_pixel_of_its_grid(channels, title):
    pictures = drawn(2, 3, channels)
    sheet = figures.sheet(pictures, ["one", "a longer label"], ["a", "b", "c\nd"], title)
    canvas = images.grid(pictures.reshape(6, 8, 8, channels), columns=3, padding=6, scale=12)
    canvas = np.broadcast_to(canvas, (*canvas.shape[:2], 3))
    assert (sheet.dtype, sheet.shape[2]) == (np.uint8, 3)
    bottom = sheet[-canvas.shape[0] - 4 : -4]
    found = [
        x for x in range(sheet.shape[1] - canvas.shape[1] + 1) if (bottom[:, x:][:, : canvas.shape[1]] == canvas).all()
    ]
    assert len(found) == 1
    labels = sheet[:, : found[0]]
    assert labels.min() < 100  # somebody wrote there


def test_labels_are_on_the_sheet_whole():
    """Nothing is cut off at an edge: the outermost pixels are white."""
    sheet = figures.sheet(drawn(2, 2), ["a rather long label", "b"], ["1234567890", "t = 999\n0.01 x0 +\n1.00 eps"])
    for edge in (sheet[0], sheet[:, 0], sheet[:, -1]):
        assert (edge == 255).all()


def test_plots_lie_side_by_side_and_stack_below_one_another():
    x = np.arange(1, 5)
    panel = figures.Panel("title", "t", x, {"a": x, "b": x**2}, log=True)
    one, two = figures.plots([panel]), figures.plots([panel, panel._replace(log=False)])
    assert two.shape == (one.shape[0], 2 * one.shape[1], 3)
    both = figures.stack([one, two])
    assert both.shape == (2 * one.shape[0], two.shape[1], 3)
    np.testing.assert_array_equal(both[one.shape[0] :], two)
    assert (both[: one.shape[0], one.shape[1] :] == 255).all()


def test_the_figures_of_a_notebook_are_left_alone():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figures.sheet(drawn(1, 1), [""], ["x"])
    assert plt.get_fignums() == before
