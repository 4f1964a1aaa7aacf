"""Pairing: nothing is lost without being counted, nothing pairs that should not, and the newest pair wins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from matchanything_ros.pairing import Drop, Pair, Pairing

MS = 1_000_000
# Stamps in milliseconds, also going back a little (late) and far (clock); takes interleaved as a slow matcher would.
events = st.lists(
    st.one_of(
        st.tuples(st.just("image"), st.integers(0, 1), st.integers(0, 4000)),
        st.tuples(st.just("take"), st.booleans(), st.just(0)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def play(pairing: Pairing, script: list) -> list[Pair]:
    pairs = []
    for kind, which, stamp in script:
        if kind == "image":
            pairing.add(which, stamp * MS, (which, stamp))
        elif kind == "take":
            pair = pairing.take(wait=which)
            pairs += [pair] if pair else []
        else:
            pairing.clear()
        check_conservation(pairing)
    return pairs


def check_conservation(pairing: Pairing) -> None:
    for camera in (0, 1):
        dropped = sum(pairing.dropped[camera].values())
        assert pairing.received[camera] == pairing.paired + pairing.waiting[camera] + dropped


@given(events, st.integers(0, 200), st.booleans(), st.integers(1, 5))
def test_every_image_is_paired_waiting_or_counted(script: list, tolerance_ms: int, exact: bool, size: int) -> None:
    pairing = Pairing(tolerance_ms / 1000, exact, size)
    pairs = play(pairing, script)
    assert len(pairs) == pairing.paired
    assert all(waiting <= size + 1 for waiting in pairing.waiting)
    for pair in pairs:
        assert abs(pair.stamp0 - pair.stamp1) <= (0 if exact else tolerance_ms * MS)
        assert pair.image0 == (0, pair.stamp0 // MS) and pair.image1 == (1, pair.stamp1 // MS)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 60)), max_size=80), st.integers(1, 50))
def test_without_clock_jumps_pairs_are_in_order_and_no_image_is_used_twice(steps: list, tolerance_ms: int) -> None:
    clock, script = [0, 0], []
    for camera, step in steps:
        clock[camera] += step
        script += [("image", camera, clock[camera]), ("take", True, 0)]
    pairing = Pairing(tolerance_ms / 1000, queue_size=100)
    pairs = play(pairing, script)
    for stamps in ([pair.stamp0 for pair in pairs], [pair.stamp1 for pair in pairs]):
        assert stamps == sorted(set(stamps))
    assert pairing.clock_jumps == 0
    assert not any(dropped[Drop.BUSY] or dropped[Drop.OUT_OF_ORDER] for dropped in pairing.dropped)


@given(st.permutations([(camera, stamp) for camera in (0, 1) for stamp in range(0, 500, 100)]))
def test_any_arrival_order_pairs_all_of_two_synchronous_cameras(arrivals: list) -> None:
    per_camera = [sorted(stamp for which, stamp in arrivals if which == camera) for camera in (0, 1)]
    pairing, pairs = Pairing(0.03), []
    for camera, _ in arrivals:  # each camera's own images stay in order, as on a topic
        pairing.add(camera, per_camera[camera].pop(0) * MS, None)
        if pair := pairing.take():
            pairs.append(pair)
    busy = pairing.dropped[0][Drop.BUSY]
    assert len(pairs) + busy == 5 and sum(map(sum, (d.values() for d in pairing.dropped))) == 2 * busy


def test_newest_pair_wins_while_the_matcher_is_busy() -> None:
    pairing = Pairing()
    for stamp in (0, 100, 200):
        pairing.add(0, stamp * MS, None)
        pairing.add(1, stamp * MS, None)
    pair = pairing.take()
    assert pair is not None and pair.stamp0 == 200 * MS
    assert pairing.take() is None
    assert [dropped[Drop.BUSY] for dropped in pairing.dropped] == [2, 2]


def test_tolerance_is_inclusive_and_exact_ignores_it() -> None:
    for exact, offset, expected in ((False, 50, 1), (False, 51, 0), (True, 1, 0), (True, 0, 1)):
        pairing = Pairing(0.05, exact)
        pairing.add(0, 0, None)
        pairing.add(1, offset * MS, None)
        assert (pairing.take(wait=False) is not None) == bool(expected)


def test_slow_camera_first_waits_for_the_nearest_image_of_the_fast_one() -> None:
    pairing = Pairing(0.05)
    for stamp in (0, 33, 66):
        pairing.add(0, stamp * MS, None)
    pairing.add(1, 100 * MS, None)
    assert pairing.take() is None  # 66 is within the tolerance, but the next image of camera 0 will be nearer
    pairing.add(0, 99 * MS, None)
    pair = pairing.take()
    assert pair is not None and pair.stamp0 == 99 * MS
    assert pairing.dropped[0][Drop.UNPAIRED] == 3


def test_the_wait_ends_when_asked_or_when_the_slow_camera_moves_on() -> None:
    for by_take in (True, False):
        pairing = Pairing(0.05)
        for stamp in (0, 33, 66):
            pairing.add(0, stamp * MS, None)
        pairing.add(1, 100 * MS, None)
        if not by_take:
            pairing.add(1, 200 * MS, None)
        pair = pairing.take(wait=not by_take)
        assert pair is not None and (pair.stamp0, pair.stamp1) == (66 * MS, 100 * MS)


def test_a_silent_camera_makes_the_other_stale_and_memory_bounded() -> None:
    pairing = Pairing(queue_size=4)
    for stamp in range(100):
        pairing.add(1, stamp * MS, None)
    assert pairing.waiting == (0, 4) and pairing.dropped[1][Drop.STALE] == 96


def test_late_and_repeated_stamps_are_out_of_order() -> None:
    pairing = Pairing()
    for stamp in (100, 100, 90):
        pairing.add(0, stamp * MS, None)
    assert pairing.dropped[0] == {Drop.OUT_OF_ORDER: 2} and pairing.clock_jumps == 0


def test_clock_jumping_back_starts_over() -> None:
    pairing = Pairing(0.01)
    for stamp in (90_000, 90_100):
        pairing.add(0, stamp * MS, "old")
    pairing.add(1, 90_500 * MS, "old")
    pairs = []
    for stamp in range(0, 500, 100):  # the bag starts again, camera 0 first
        pairing.add(0, stamp * MS, "new")
        pairing.add(1, (stamp + 1) * MS, "new")
        if pair := pairing.take():
            pairs.append(pair)
    assert len(pairs) == 5 and all(pair.image0 == pair.image1 == "new" for pair in pairs)
    assert pairing.clock_jumps == 1
    assert pairing.dropped[1] == {Drop.CLOCK_RESET: 1}
    assert sum(pairing.dropped[0].values()) == 2


def test_a_short_recording_that_starts_again_and_again() -> None:
    """0.8 seconds at 10 Hz: too short for a jump, but three late images in a row are no late images."""
    pairing, answered = Pairing(), 0
    for _ in range(10):
        for stamp in range(8):
            for camera in (0, 1):
                pairing.add(camera, stamp * 100_000_000 + camera, None)
            answered += pairing.take() is not None
    assert answered == 8 + 9 * 6 and pairing.clock_jumps > 0


def test_two_late_images_are_late() -> None:
    pairing = Pairing()
    for stamp in (10, 40, 20, 30, 50, 45, 60, 55, 70):  # hundredths of a second
        pairing.add(0, stamp * 10_000_000, None)
    assert pairing.clock_jumps == 0 and pairing.dropped[0][Drop.OUT_OF_ORDER] == 4
