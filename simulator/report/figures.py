"""Pictures of loads and traffic as SVG text, to be put inside a page.

Knows matrices and labels. Knows nothing of plans or where a page goes. Equal input, equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def heat_maps(
    matrices: Mapping[str, FloatArray], *, rows: str, columns: str, scale: str
) -> str:
    """Matrices side by side on one colour scale, so that their colours compare.

    matrices: name -> [rows, columns]. scale: what a colour means.
    """
    import matplotlib
    from matplotlib.figure import Figure

    low = min(float(m.min()) for m in matrices.values())
    high = max(float(m.max()) for m in matrices.values())
    with matplotlib.rc_context({"svg.hashsalt": "loadmaster", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.2 * len(matrices) + 1.0, 3.6), layout="constrained")
        axes = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
            image = axis.imshow(
                matrix, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest"
            )
            axis.set_title(name, fontsize=10)
            axis.set_xlabel(columns)
            axis.set_ylabel(rows)
        figure.colorbar(image, ax=axes.tolist(), label=scale)
        return _svg(figure)


def step_lines(series: Mapping[str, FloatArray], *, quantity: str) -> str:
    """One line per plan over the steps, the mean in the legend."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "loadmaster", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9.4, 2.8), layout="constrained")
        axis = figure.subplots()
        for name, values in series.items():
            mean = float(np.nanmean(values))
            axis.plot(values, linewidth=1.2, label=f"{name}, mean {mean:.3f}")
        axis.set_xlabel("step")
        axis.set_ylabel(quantity)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
        return _svg(figure)


def _svg(figure: object) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
