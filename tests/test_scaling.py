"""The projection's formulas against compiled counts and by hand."""

import pytest
import scaling

from jdit.nn import attention, exchange
from jdit.nn.wan import WanConfig


def test_attention_is_what_the_program_without_it_lacks(monkeypatch):
    """512 video tokens and 512 of text: the products of scores and values, and 2% of exponentials."""
    cfg = WanConfig(heads=2, head_dim=128, mlp=128, layers=1, text_dim=32)
    monkeypatch.setitem(scaling.CASES, "tiny", (None, (2, 32, 32), 1))
    monkeypatch.setattr(scaling, "config", lambda case: cfg)
    flops = lambda: scaling.lowered("tiny", 1).cost_analysis()["flops"]
    whole = flops()
    monkeypatch.setattr(attention, "BACKENDS", {})
    for name in ("attention_with_lse", "attention_to_all"):  # put back afterwards
        monkeypatch.setattr(exchange, name, getattr(exchange, name))
    scaling.replace_attention()
    assert whole - flops() == pytest.approx(scaling.attention_flop("tiny"), rel=0.03)


def test_times_of_collectives():
    h100, v5p = scaling.CHIPS["H100"], scaling.CHIPS["v5p"]
    spent = lambda chip, kind, group, ways: scaling.collective_time(chip, kind, 1e9, group, ways) - chip.late
    assert spent(h100, "all-to-all", 2, 2) == pytest.approx(0.5e9 / 250e9)  # half of it comes from the other
    assert spent(h100, "all-to-all", 16, 16) == pytest.approx(0.5e9 / 40e9)  # half from the other host
    # half comes by eight ports; passing all of it on inside the host takes longer
    assert spent(h100, "all-gather", 16, 16) == pytest.approx(15 / 16 * 1e9 / 250e9)
    assert spent(h100, "collective-permute", 2, 8) == pytest.approx(1e9 / 250e9)
    assert spent(v5p, "all-to-all", 2, 2) == pytest.approx(0.5e9 / 90e9)
    assert spent(v5p, "all-gather", 2, 2) == pytest.approx(0.5e9 / 90e9)
