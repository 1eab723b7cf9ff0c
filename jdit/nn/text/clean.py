"""Prompt cleaning as the Wan pipelines do it (upstream pipeline_wan.py: basic_clean, whitespace_clean)."""

import html
import re

import ftfy

SPACES = re.compile(r"[^\S\x1c-\x1f]+")
"""White space as upstream's `regex` package has it: without the four separators that Python's own `\\s` includes."""


def clean(text: str) -> str:
    """Repaired mojibake and character widths (ftfy), HTML entities resolved twice, one blank for any white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return SPACES.sub(" ", text).strip()
