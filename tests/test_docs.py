"""The Python in the documentation runs, and the names that it speaks of exist."""

import re
from pathlib import Path

from jdit import sampling
from jdit.sampling import segments

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "sampling.md").read_text()


def run(name: str) -> tuple[int, dict]:
    """How many blocks of Python a page has, and what they leave behind."""
    blocks, space = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE), {}
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), space)
    return len(blocks), space


def test_the_example_runs():
    count, space = run("sampling.md")
    assert count == 3
    assert space["progress"].index == 9 and space["late"].steps == 30
    assert space["changed"].shape == space["sample"].shape


def test_several_processes():
    count, space = run("multihost.md")
    assert count == 1 and space["pipe"].mesh.size == 1


def test_segments():
    count, space = run("segments.md")
    assert count == 2 and [len(piece) for piece in space["pieces"]] == [5, 5, 5]
    assert list(space["timings"]) == ["plan", "make[0]", "make[1]", "make[2]", "merge"]


def test_the_table_of_segments():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", (DOCS / "segments.md").read_text(), re.M)
    assert len(rows) == 7
    for frames, *told in (map(int, row) for row in rows):
        plans = [segments.plan(frames, 77, overlap) for overlap in (1, 5)]
        assert told == [n for plan in plans for n in (plan.count, plan.padded)]


def test_the_names_exist():
    named = set(re.findall(r"sampling\.([a-z_]\w*)\(", PAGE)) | set(re.findall(r"`([a-z_]+)\(", PAGE))
    assert len(named) > 20
    assert named - {"from_config"} <= set(sampling.__all__), named - set(sampling.__all__)
