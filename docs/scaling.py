"""Draws docs/images/scaling.png from benchmarks/scaling.json: how many times as fast a step is on more chips.

pip install matplotlib && python docs/scaling.py
"""

import io
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#1f77b4", "#d62728", "#e07b39", "#2e8b57", "#7b2d8b", "#17a2b8", "#555555")
MARKERS = "os^DvP*"


def main():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    rows = json.loads((ROOT / "benchmarks" / "scaling.json").read_text())["projected"]
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    chips = list(dict.fromkeys(r["chip"] for r in rows))
    figure, axes = plt.subplots(1, len(chips), figsize=(13, 4.6), sharex=True, sharey=True, layout="constrained")
    for ax, chip in zip(axes, chips):
        ways = sorted({r["chips"] for r in rows})
        ax.loglog(ways, ways, ":", color="#999999", lw=1, label="as many times as chips")
        for case, colour, marker in zip(dict.fromkeys(r["case"] for r in rows), COLOURS, MARKERS):
            line = sorted(
                (r["chips"], r["seconds"], r["overlapped"]) for r in rows if (r["chip"], r["case"]) == (chip, case)
            )
            one = line[0][1]
            ax.loglog([n for n, *_ in line], [one / s for _, s, _ in line], marker=marker, ms=4, lw=1.3, color=colour,
                      label=case)  # fmt: skip
            ax.fill_between([n for n, *_ in line], [one / s for _, s, _ in line], [one / o for *_, o in line],
                            color=colour, alpha=0.1, lw=0)  # fmt: skip
        ax.set_title(f"{chip}, projected", fontsize=10)
        ax.set_xticks(ways, [str(n) for n in ways])
        ax.set_yticks(ways, [str(n) for n in ways])
        ax.minorticks_off()
        ax.set_xlabel("chips")
        ax.grid(True, lw=0.4, alpha=0.5)
    axes[0].set_ylabel("times as fast as one chip")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    picture = Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(ROOT / "docs" / "images" / "scaling.png", optimize=True)


if __name__ == "__main__":
    main()
