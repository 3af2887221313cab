"""The figure style: labels apart, files with alt text, the same bytes twice."""
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, strategies as st

from kdbook import plots
from kdbook.plots import COLOURS, SERIES, band, contrast, image_grid, label_lines, panels, save_figure, spread, use_style


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.floats(0.1, 5))
def test_spread_keeps_order_distance_and_mean(positions, distance):
    moved = spread(positions, distance)
    order = np.argsort(positions, kind="stable")
    assert np.all(np.diff(moved[order]) >= distance - 1e-9)
    assert np.isclose(np.mean(moved), np.mean(positions), atol=1e-6)
    if np.all(np.diff(np.sort(positions)) >= distance):
        assert np.allclose(moved, positions)


def test_roles_are_visible_and_apart():
    assert all(contrast(COLOURS[role]) >= 3 for role in ("teacher", "baseline", "method", "second", "third"))
    assert len(set(SERIES)) == len(SERIES) and contrast("#ffffff") == 1.0


def test_labels_do_not_overlap():
    use_style()
    fig, ax = panels()
    for i in range(5):
        ax.plot([0, 1], [0, 1 + 0.01 * i], label=f"line {i}")
    ax.plot([0, 1], [0, 0.5])
    ax.plot([0, 1], [np.nan, np.nan], label="nothing")
    label_lines(ax)
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:])
    plt.close(fig)


def test_band_is_the_t_interval():
    from scipy import stats
    fig, ax = panels()
    values = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 9.0]])
    line = band(ax, [0, 1], values, role="method", label="m")
    assert np.allclose(line.get_ydata(), values.mean(0)) and line.get_color() == COLOURS["method"]
    low, high = stats.t.interval(0.95, 2, loc=values.mean(0), scale=stats.sem(values))
    corners = ax.collections[0].get_paths()[0].vertices
    assert np.isclose(corners[:, 1].min(), low.min()) and np.isclose(corners[:, 1].max(), high.max())
    with pytest.raises(ValueError, match="one column for each of the 3 points"):
        band(ax, [0, 1, 2], values)
    plt.close(fig)


def test_saving(tmp_path):
    use_style(tmp_path / "a")
    for folder in ("a", "b"):
        use_style(tmp_path / folder)
        fig, ax = panels()
        ax.plot([0, 1], label="x")
        save_figure(fig, "my-figure", alt="A line & more.")
        assert not plt.fignum_exists(fig.number)
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a/my-figure.{suffix}").read_bytes() == (tmp_path / f"b/my-figure.{suffix}").read_bytes()
    assert "A line &amp; more." in (tmp_path / "a/my-figure.svg").read_text()
    use_style("")
    assert plots._output_folder is None


@pytest.mark.parametrize("name, alt", [("a/b", "x"), ("", "x"), ("../up", "x"), ("ok", "  ")])
def test_bad_names_and_missing_alt_text(name, alt, tmp_path):
    use_style(tmp_path)
    fig, _ = panels()
    with pytest.raises(ValueError, match="name must be|alt must say"):
        save_figure(fig, name, alt=alt)
    assert not list(tmp_path.iterdir())
    plt.close(fig)


def test_shapes_of_panels_and_grids():
    assert isinstance(panels()[1], plt.Axes)
    assert panels(3)[1].shape == (3,) and panels(2, 2)[1].shape == (2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        panels(0)
    assert len(image_grid(np.zeros((5, 4, 4)), columns=3).axes) == 6
    assert len(image_grid(np.zeros((2, 4, 4, 3)), titles=["a", "b"]).axes) == 2
    with pytest.raises(ValueError, match="images must have shape"):
        image_grid(np.zeros((4, 4)))
    plt.close("all")
