"""jdit's side of the GPU benchmarks, tiny: they call the stages of pipelines, and must follow what those take."""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # programs of pipelines that other tests compile on newer versions

CASES = [
    ("sd3", "jdit:sd3.5-large"), ("wan", "jdit:14b"), ("animate_speed", "jdit:segment"), ("cogvideox", "jdit:step"),
    ("cogvideox", "jdit:decode"), ("qwen_image", "jdit:edit 1024"), ("qwen_image", "jdit:decode 1328"),
    ("hunyuan_video", "jdit:step 544"), ("hunyuan_video", "jdit:decode 544"),
]  # fmt: skip


@pytest.mark.parametrize("script, case", CASES, ids=lambda x: x)
def test_case_runs(script, case):
    module = importlib.import_module(script)
    assert case in module.CASES
    work = module.work(case, True)
    out = np.asarray(work.call(), np.float32)
    assert np.isfinite(out).all() and out.std() > 0
