"""The plot of why one forks: what two busy roles get done, in one process and in two."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

LACKING = "bench: a plot needs matplotlib: pip install -e '.[bench]', or leave --plot out"


def wanted(path: Path | None) -> Path | None:
    """The path, where a plot can be made; before anything is measured."""
    if path is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            sys.exit(LACKING)
    return path


def throughputs(path: Path, rates: dict[str, list[float]]) -> None:
    """Each window a point, each median a bar; in rounds a second, of all threads or processes together."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "slurmfork"  # the same figures make the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    names = list(rates)
    middle = [statistics.median(rates[name]) / 1e6 for name in names]
    bars = axes.barh(names, middle, color=["#2a6f97", "#a9d6e5", "#6c757d", "#ced4da"][: len(names)])
    axes.bar_label(bars, [f"{value:.1f}" for value in middle], padding=4)
    for at, name in enumerate(names):
        axes.plot([rate / 1e6 for rate in rates[name]], [at] * len(rates[name]), "k|", markersize=10)
    axes.invert_yaxis()
    axes.set_xlabel("million rounds of pure Python a second, both together (bar: median; mark: each window)")
    axes.set_title("Two busy roles on two cores")
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
