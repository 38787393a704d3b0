"""A chart of a decode step's time by kernel, stacked for each width, one panel a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtvlm.model.errors import UserError

OTHER = "between kernels"


def stacks(steps: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Milliseconds a step of each kernel, by width, the slowest first; what the kernels do not explain is OTHER."""
    found: dict[str, list[float]] = {}
    for index, step in enumerate(steps):
        for name, kernel in step["kernels"].items():
            found.setdefault(name, [0.0] * len(steps))[index] = kernel["us"] * kernel["launches"] / 1e3
    found = dict(sorted(found.items(), key=lambda each: -max(each[1])))
    sums = [sum(times[index] for times in found.values()) for index in range(len(steps))]
    found[OTHER] = [max(0.0, step["ms"]["p50"] - whole) for step, whole in zip(steps, sums, strict=True)]
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Write the chart, in the form that the file's name asks for. UserError: nothing to draw, or no such form or folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = {name: entry["steps"] for name, entry in record["models"].items() if entry.get("steps")}
    if not models:
        raise UserError("No decode steps were measured, so there is nothing to plot: measure with the part 'decode'.")
    with pyplot.rc_context({"svg.hashsalt": "trtvlm", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(models), figsize=(4.2 * len(models), 4), squeeze=False)
        names = list(dict.fromkeys(name for steps in models.values() for name in stacks(steps) if name != OTHER))
        colours = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False)) | {OTHER: "#dddddd"}  # type: ignore[attr-defined]
        for axis, (model, steps) in zip(axes[0], models.items(), strict=True):
            at, bottom = range(len(steps)), [0.0] * len(steps)
            for name, times in stacks(steps).items():
                axis.bar(at, times, bottom=bottom, label=name, color=colours.get(name, "#999999"), width=0.7)
                bottom = [below + time for below, time in zip(bottom, times, strict=True)]
            for position, step in zip(at, steps, strict=True):
                axis.plot([position - 0.4, position + 0.4], [step["ms"]["p50"]] * 2, color="black", linewidth=1.2)
            axis.set_xticks(list(at), [str(step["rows"]) for step in steps])
            axis.set(title=model, xlabel="rows", ylabel="ms a step (line: whole step, p50)")
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=7)
        figure.suptitle(f"{record['gpu']}, context {record['context']:,}, INT4, {record['date']}", fontsize=9)
        figure.tight_layout()
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be drawn ({error}): give a name that ends in .svg or .png.") from None
        finally:
            pyplot.close(figure)
