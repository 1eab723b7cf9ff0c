"""The table engine: every key one rule, every element one source, and all problems at once."""

import ml_dtypes
import numpy as np
import pytest
import util_toy as toy

from convert import ops
from convert.table import ALL, ConversionError, Fill, Rule, Source, back, common_dtype, fill, plan
from jdit.sharding import dotted

BF16 = np.dtype(ml_dtypes.bfloat16)
TARGETS = {dotted(p): leaf for p, leaf in toy.targets().items()}


def shapes(tensors):
    return {k: v.shape for k, v in tensors.items()}


def test_every_leaf_is_what_putting_it_together_by_hand_gives():
    tensors = toy.state()
    fills = {f.path: f for f in plan(shapes(tensors), toy.RULES, TARGETS)}
    want = toy.expected(tensors)
    assert set(fills) == {dotted(p) for p in want}
    for path, array in want.items():
        assert toy.same(fill(fills[dotted(path)], tensors.__getitem__), array), path


def test_large_transposition_goes_in_tiles():
    w = np.random.default_rng(0).standard_normal((700, 300)).astype(BF16)
    f = Fill("k", (2, 300, 700), BF16, [Source("a", ops.linear, (0,)), Source("b", ops.linear, (1,))])
    assert toy.same(fill(f, {"a": w, "b": w[::-1]}.__getitem__), np.stack([w.T, w[::-1].T]))


def test_back_is_the_inverse():
    tensors = toy.state()
    leaves = {dotted(p): a for p, a in toy.expected(tensors).items()}
    written = {key: op.inverse(leaves[path][index]) for key, path, index, op in back(toy.RULES, leaves)}
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[k], tensors[k]) for k in tensors)


def test_missing_and_unknown_are_reported_together():
    tensors = toy.state()
    tensors["layers.1.up.wieght"] = tensors.pop("layers.1.up.weight")
    tensors["layers.9.q.bias"] = tensors["layers.0.q.bias"]
    with pytest.raises(ConversionError) as e:
        plan(shapes(tensors), toy.RULES, TARGETS)
    for part in ("layers.1.up.wieght: no rule takes it", "layers.9.q.bias: no rule", "layers.1.up.weight: missing"):
        assert part in str(e.value)
    assert str(e.value).startswith("3 problems:")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([*toy.RULES, Rule("layers.{i}.up.{j}", None), Rule("gai{i}", None), Rule("gain", None)], "2 rules take it"),
        ([r for r in toy.RULES if r.source != "gain"], "gain: no rule takes it"),
        ([r._replace(target="nowhere") if r.target == "gain" else r for r in toy.RULES], "has no parameter nowhere"),
        ([r._replace(op=ops.same) if "up.weight" in r.source else r for r in toy.RULES], "blocks.up.kernel wants"),
        ([r._replace(at=(ALL, 0)) if r.source == "layers.{i}.v.weight" else r for r in toy.RULES], "already comes"),
    ],
)
def test_a_wrong_table_is_told(rules, message):
    with pytest.raises(ConversionError, match=message):
        plan(shapes(toy.state()), rules, TARGETS)


def test_single_problem_is_one_line_with_its_file():
    tensors = toy.state()
    tensors["stem.weight"] = tensors["stem.weight"][:, :, 0]
    with pytest.raises(ConversionError) as e:
        plan(shapes(tensors), toy.RULES, TARGETS, lambda key: "some.safetensors")
    assert "\n" not in str(e.value) and str(e.value).startswith("some.safetensors: stem.weight: shape (8, 6, 3)")


def test_mixed_dtypes_are_widened_never_narrowed():
    values = {"a": np.float32([1 + 2**-20]), "b": np.ones(1, BF16)}
    for order in (("a", "b"), ("b", "a")):
        f = Fill("x", (2, 1), np.dtype(np.float32), [Source(k, ops.same, (n,)) for n, k in enumerate(order)])
        got = fill(f, values.__getitem__)
        assert got.dtype == np.float32 and got[order.index("a"), 0] == values["a"][0]
    assert common_dtype([BF16, np.float16]) == np.float32
    assert common_dtype([ml_dtypes.float8_e4m3fn, BF16]) == BF16
    assert common_dtype([ml_dtypes.float8_e4m3fn] * 2) == ml_dtypes.float8_e4m3fn
    assert common_dtype([np.float64, BF16]) == np.float64


def test_alias_fills_only_what_the_first_name_does_not():
    rules = [Rule("a", "x"), Rule("b", "x", alias=True)]
    leaf = {"x": np.zeros(3, np.float32)}
    assert [s.key for s in plan({"b": (3,)}, rules, leaf)[0].sources] == ["b"]
    assert [s.key for s in plan({"a": (3,), "b": (3,)}, rules, leaf)[0].sources] == ["a"]
    assert [k for k, *_ in back(rules, leaf)] == ["a"]
