"""What a process holds of a leaf is read, and hardly more."""

import numpy as np
import pytest
import util_toy as toy
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import table
from convert.readers import open_folder
from jdit import blocks, checkpoint, spans
from jdit.sharding import box, dotted, make_mesh

F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def fills(tmp_path_factory):
    """(reader, fills, leaves by dotted path) of a checkpoint with stacked, fused, transposed and scalar leaves."""
    folder = tmp_path_factory.mktemp("toy")
    toy.write(folder, toy.state())
    reader = open_folder(folder)
    planned = table.plan(reader.keys(), toy.RULES, {dotted(p): leaf for p, leaf in toy.targets().items()})
    return reader, planned, {dotted(p): a for p, a in toy.expected(toy.state()).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same leaves in a jdit checkpoint, of blocks of a row or two."""
    folder, before = tmp_path_factory.mktemp("saved") / "x", blocks.BLOCK_BYTES
    blocks.BLOCK_BYTES = 1024
    checkpoint.save(folder, {}, {"t": toy.expected(toy.state())})
    blocks.BLOCK_BYTES = before
    return checkpoint.stored(folder, "t")


@st.composite
def boxes(draw, shape):
    ends = [draw(st.tuples(st.integers(0, n - 1), st.integers(1, n))) for n in shape]
    return tuple(slice(min(a, b - 1), max(a + 1, b)) for a, b in ends)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_block_of_any_leaf(fills, saved, data):
    reader, planned, want = fills
    fill = data.draw(st.sampled_from(planned))
    block = data.draw(boxes(fill.shape))
    got = table.fill(fill, reader.read, F32, block)
    assert toy.same(got, want[fill.path][block]) and toy.same(saved[fill.path].block(block), got)


@pytest.mark.parametrize("short", [1, 16, 4096])
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_spans_hold_the_elements_of_a_view(short, data):
    """Their bytes, and no others, are enough; of a stretch of `short` bytes or more none is too many."""
    spans.SHORT, before = short, spans.SHORT
    try:
        shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        base = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        view = base.transpose(data.draw(st.permutations(range(len(shape)))))
        view = view[data.draw(boxes(view.shape))]
        parts = list(spans.spans(view, base))
    finally:
        spans.SHORT = before
    copy = np.full_like(base, -1)
    for begin, end in parts:
        copy.reshape(-1).view(np.uint8)[begin:end] = base.reshape(-1).view(np.uint8)[begin:end]
    low = np.lib.array_utils.byte_bounds(base)[0]
    strides, start = view.strides, np.lib.array_utils.byte_bounds(view)[0] - low
    assert np.array_equal(np.ndarray(view.shape, F32, copy, start, strides), view)
    if short == 1:
        assert sum(end - begin for begin, end in parts) == view.nbytes


def test_what_is_read_of_a_matrix(tmp_path, monkeypatch):
    """Rows of the file are read alone, whole columns with what lies between them if they are short."""
    toy.write(tmp_path, {"w": np.arange(64 * 4096, dtype=np.float32).reshape(64, 4096)})
    reader, counted = open_folder(tmp_path), []
    real = spans.read

    def count(path, out, offset, parts):
        parts = list(parts)
        counted.append(sum(end - begin for begin, end in parts))
        real(path, out, offset, parts)

    monkeypatch.setattr(spans, "read", count)
    whole = reader.read("w")
    for take, size in (
        (np.s_[8:16], 8 * 4096 * 4), (np.s_[:, 2048:], 64 * 2048 * 4), (np.s_[:, 8:16], 63 * 4096 * 4 + 32),
    ):  # fmt: skip
        got = reader.read("w", lambda w, take=take: w.T.T[take])
        assert toy.same(got, whole[take]) and counted[-1] == size
    copied = reader.read("w", lambda w: w.reshape(-1, order="F")[:3])  # no view: read whole
    assert toy.same(copied, whole[:3, 0]) and counted[-1] == whole.nbytes


def test_the_block_that_a_process_holds():
    mesh = make_mesh(data=2, tensor=2)
    for leaf in toy.targets(mesh=mesh).values():  # one process has all devices
        assert box(leaf) == tuple(slice(0, n) for n in leaf.shape)
