"""Progress of a run: a bar on a terminal, a plot with samples in a notebook, lines elsewhere."""

from __future__ import annotations

import base64
import html
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ganglion._package import COLUMNS

if TYPE_CHECKING:
    from ganglion._run import Run

_NOTEBOOK_SECONDS = 1.0
_LINES_SECONDS = 10.0
_POINTS = 300
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")


class Display(Protocol):
    """Shows a run's progress."""

    def update(self, run: Run) -> None:
        """Shows what is new; called often."""

    def say(self, text: str) -> None:
        """Shows a message that stays."""

    def close(self, run: Run) -> None:
        """Shows how the run ended."""


def choose() -> Display:
    """Display for where this process runs."""
    if _in_notebook():
        return Notebook()
    return Bar() if sys.stderr.isatty() else Lines()


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def line(run: Run) -> str:
    """Progress in one line."""
    progress = run.progress()
    if progress.step == 0:
        return f"{run.name}: starting"
    losses = "  ".join(f"{name} {value:.4g}" for name, value in progress.losses.items())
    share = f"/{progress.steps}  {100 * progress.step // progress.steps}%" if progress.steps else ""
    speed = f"  {progress.images_per_second:,.0f} samples/s" if progress.images_per_second else ""
    return f"{run.name}: step {progress.step}{share}{speed}  {losses}  workers {progress.workers}"


class Nothing:
    """No progress; messages alone."""

    def update(self, run: Run) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self, run: Run) -> None:
        pass


class Lines(Nothing):
    """A line every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _LINES_SECONDS
        self._said = ""

    def update(self, run: Run) -> None:
        if time.monotonic() >= self._next:
            self.close(run)

    def close(self, run: Run) -> None:
        self._next = time.monotonic() + _LINES_SECONDS
        text = line(run)
        if text != self._said:
            self._said = text
            self.say(text)


class Bar(Nothing):
    """A bar in the last line of a terminal."""

    def update(self, run: Run) -> None:
        progress, width = run.progress(), shutil.get_terminal_size().columns - 1
        length = max(0, min(30, width - 60))
        done = length * progress.step // progress.steps if progress.steps else 0
        bar = f"[{'#' * done}{'.' * (length - done)}] " if length else ""
        sys.stderr.write("\r\x1b[K" + (bar + line(run))[:width])
        sys.stderr.flush()

    def say(self, text: str) -> None:
        sys.stderr.write("\r\x1b[K" + text + "\n")
        sys.stderr.flush()

    def close(self, run: Run) -> None:
        self.update(run)
        sys.stderr.write("\n")


class Notebook(Nothing):
    """Progress, a plot of the scalars and the newest samples, in the output of a cell."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._next = 0.0

    def update(self, run: Run) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _NOTEBOOK_SECONDS
            self._show(run)

    def close(self, run: Run) -> None:
        self._show(run)

    def _show(self, run: Run) -> None:
        from IPython.display import HTML, display  # type: ignore[import-not-found]  # there in a notebook

        page = HTML(page_of(run))
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)


def page_of(run: Run) -> str:
    """Progress, plot and newest samples as HTML."""
    progress, samples = run.progress(), run.samples()
    parts = [
        f"<div>{html.escape(line(run))}</div>",
        f'<progress style="width:100%" max="{progress.steps or 1}" value="{progress.step}"></progress>',
        plot(run.metrics()),
    ]
    drawn = [picture for picture in samples if picture.step is not None]
    if drawn:
        picture = base64.b64encode(drawn[-1].path.read_bytes()).decode()
        parts.append(
            f'<img style="max-width:100%" src="data:image/png;base64,{picture}" alt="samples of step {drawn[-1].step}">'
        )
    return "".join(parts)


def plot(rows: list[dict[str, Any]], names: Sequence[str] = ()) -> str:
    """Curves of these scalars, by default of the losses, else of the first ones, as SVG; empty without two points."""
    known = scalar_names(rows)
    names = (names or [name for name in known if "loss" in name] or known)[: len(_COLOURS)]
    stride = max(1, len(rows) // _POINTS)
    curves = {
        name: [(row["step"], row[name]) for row in rows[::stride] if isinstance(row.get(name), (int, float))]
        for name in names
    }
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    lines, legend = [], []
    for colour, (name, points) in zip(_COLOURS, curves.items()):
        path = " ".join(
            f"{590 * (step - first) / max(last - first, 1) + 5:.1f},{145 - 140 * (value - low) / ((high - low) or 1):.1f}"
            for step, value in points
        )
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
        legend.append(f'<span style="color:{colour}">{html.escape(name)} {points[-1][1]:.4g}</span>')
    frame = '<rect x="0.5" y="0.5" width="599" height="149" fill="none" stroke="#ccc"/>'
    svg = f'<svg viewBox="0 0 600 150" style="width:100%;max-width:600px">{frame}{"".join(lines)}</svg>'
    return f"<div>{svg}</div><div>{' &nbsp; '.join(legend)} &nbsp; from {low:.4g} to {high:.4g}</div>"


def scalar_names(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the scalars in rows of metrics, in order."""
    names = dict.fromkeys(name for row in rows[-1:] for name in row)
    return [name for name in names if name not in COLUMNS and not name.startswith("setting_")]
