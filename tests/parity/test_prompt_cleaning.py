"""Prompt cleaning against the Wan pipelines of diffusers."""

import pytest

pytest.importorskip("torch")
wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from jdit.nn.text.clean import clean  # noqa: E402

pytestmark = pytest.mark.torch

PROMPTS = [
    "", " ", "\u3000\t", "a photo of a cat", "双人舞在海边，夕阳下　奔跑的猫。", "  lead and trail \n",
    "two\r\n\r\nlines\ttab\x0bvt\x0cff", "&amp; &lt;b&gt; &amp;amp;lt; &nbsp;x &#x732b; &copy &notanentity;",
    "schÃ¶n â€œquotedâ€\x9d itâ€™s", "“curly” ‘single’ — dash…", "ﬁne ﬀ Ⅷ ① Ａ１ ｶﾞ", "e\u0301 \u212b \u0130",
    "zero\u200bwidth\ufeffbom\u00adsoft", "nbsp\u00a0em\u2003line\u2028para\u2029nel\x85end", "unit\x1fsep\x1crec",
    "bell\x07 \x1b[31mred\x1b[0m nul\x00", "😀👩‍👩‍👧🏳️‍🌈", "\ud7ff\ufffd\U0010ffff", "<tag> a  <  b", "&lt;i&gt;",
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_equals_upstream(prompt):
    assert wan.is_ftfy_available()
    assert clean(prompt) == wan.prompt_clean(prompt)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(sorted(set("".join(PROMPTS)))), max_size=40) | st.text(max_size=30))
def test_equals_upstream_on_any_text(prompt):
    assert clean(prompt) == wan.prompt_clean(prompt)
