"""The Python in the documentation runs, and the names that it speaks of exist."""

import re
from pathlib import Path

from jdit import sampling

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "sampling.md").read_text()


def test_the_example_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    space = {}
    for block in blocks:
        exec(compile(block, "docs/sampling.md", "exec"), space)
    assert space["progress"].index == 9 and space["late"].steps == 30
    assert space["changed"].shape == space["sample"].shape


def test_the_names_exist():
    named = set(re.findall(r"sampling\.([a-z_]\w*)\(", PAGE)) | set(re.findall(r"`([a-z_]+)\(", PAGE))
    assert len(named) > 20
    assert named - {"from_config"} <= set(sampling.__all__), named - set(sampling.__all__)
