"""Segments: which frames each makes, and the two ways to run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdit.sampling import segments

GOLDEN = {  # (frames, length, overlap) -> segments, padded frames; upstream's loop, traced by hand
    (1, 77, 1): (1, 77),
    (76, 77, 1): (1, 77),
    (77, 77, 1): (1, 77),
    (78, 77, 1): (2, 153),
    (153, 77, 1): (2, 153),
    (154, 77, 1): (3, 229),
    (5, 77, 5): (1, 77),
    (77, 77, 5): (1, 77),
    (78, 77, 5): (2, 149),
    (149, 77, 5): (2, 149),
    (150, 77, 5): (3, 221),
    (221, 77, 5): (3, 221),
    (9, 9, 5): (1, 9),
    (10, 9, 5): (2, 13),
    (14, 9, 5): (3, 17),
    (10, 5, 1): (3, 13),
}


@pytest.mark.parametrize("given", GOLDEN)
def test_counts_around_the_boundaries(given):
    plan = segments.plan(*given)
    assert (plan.count, plan.padded) == GOLDEN[given]


@pytest.mark.parametrize("overlap", [1, 5])
@pytest.mark.parametrize("length", [9, 13, 77])
def test_each_frame_is_made_once(length, overlap):
    for frames in range(1, 3 * length):
        plan = segments.plan(frames, length, overlap)
        made = [range(*plan.span(i))[plan.kept(i)] for i in range(plan.count)]
        assert [n for part in made for n in part] == list(range(frames))
        assert plan.span(plan.count - 1)[1] == plan.padded >= frames
        assert all(plan.span(i)[1] - plan.span(i + 1)[0] == overlap for i in range(plan.count - 1))


def test_driving_videos_are_padded_back_and_forth():
    assert list(segments.reflected(5, 0, 10)) == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1]
    assert list(segments.reflected(2, 3, 7)) == [1, 0, 1, 0]
    assert list(segments.reflected(1, 0, 3)) == [0, 0, 0]


@pytest.mark.torch
@pytest.mark.parametrize("have", [2, 3, 5, 8])
def test_padding_is_upstreams(have):
    from diffusers import WanAnimatePipeline

    pad = lambda n: WanAnimatePipeline.pad_video_frames(None, list(range(have)), n)  # type: ignore[arg-type]
    for n in range(1, 4 * have):
        assert list(segments.reflected(have, 0, n)) == pad(n)


@pytest.mark.parametrize(
    "given, words",
    [
        ((0, 77, 1), "0 frames"),
        ((10, 77, 2), "overlap_frames=2; it may be 1 or 5"),
        ((10, 76, 1), "segment_frames=76 does not work, 73 or 77 would"),
        ((10, 5, 5), "segment_frames=5 does not work, 9 would"),
        ((10, 1, 1), "segment_frames=1 does not work, 5 would"),
    ],
)
def test_what_does_not_fit_is_refused(given, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        segments.plan(*given)


def test_any_overlap_where_the_model_does_not_mind():
    assert segments.plan(40, 21, 9, overlaps=None).count == 3
    with pytest.raises(ValueError, match="1 \\+ 4 n"):
        segments.plan(40, 21, 8, overlaps=None)


def test_noise_of_a_segment_depends_on_its_key_and_number_alone():
    keys = [jax.random.key(s) for s in (3, 8)]
    both, other = (segments.noise(keys, i, (2, 3)) for i in (0, 1))
    assert np.array_equal(both[1:], segments.noise(keys[1:], 0, (2, 3)))
    assert not np.allclose(both, other) and not np.allclose(both[0], both[1])


def test_scan_equals_stream():
    def segment(carry, x):
        total = carry + jnp.sin(x)
        return total * 0.5, {"out": total, "in": x}

    items = jnp.arange(4.0).reshape(4, 1)
    last, scanned = segments.scan(segment, jnp.zeros(1), items)
    streamed = list(segments.stream(segment, jnp.zeros(1), items))
    np.testing.assert_allclose(last, streamed[-1][0], rtol=1e-6)
    np.testing.assert_allclose(scanned["out"], [r["out"] for _, r in streamed], rtol=1e-6)


def test_stream_asks_for_an_item_when_it_is_due():
    asked = []

    def items():
        for i in range(3):
            asked.append(i)
            yield jnp.float32(i)

    running = segments.stream(lambda carry, x: (carry + x, x), jnp.float32(0), items())
    next(running)
    assert asked == [0]
