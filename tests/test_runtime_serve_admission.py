"""Who is let in: the bound on the time of a picture, against a clock that the test turns."""

from __future__ import annotations

import contextlib

import pytest

from runtime.serve.admission import LatencyAdmission
from runtime.serve.request_errors import RequestError


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Line:
    """Pictures that enter and leave by hand."""

    def __init__(self, max_latency_s=None):
        self.clock = Clock()
        self.admission = LatencyAdmission(max_latency_s, self.clock)
        self.inside = []

    def enter(self, pictures=1):
        stack = contextlib.ExitStack()
        stack.enter_context(self.admission.admitted(pictures))
        self.inside.append(stack)

    def leave(self, after_s):
        self.clock.now += after_s
        self.inside.pop(0).close()

    def give_up(self, pictures, after_s):
        self.enter(pictures)
        self.clock.now += after_s
        assert not self.inside.pop().__exit__(KeyError, KeyError(), None)

    def alone(self, seconds):
        self.enter()
        self.leave(seconds)

    def fill(self):
        """Enters until one is refused; the refusal."""
        for _ in range(1000):
            try:
                self.enter()
            except RequestError as error:
                return error
        raise AssertionError("never refused")

    def pair(self, seconds):
        """Two that share the server and leave together, `seconds` after they came."""
        self.enter()
        self.enter()
        self.leave(seconds / 2)
        self.leave(seconds / 2)


def test_many_are_let_in_before_anything_was_measured_and_one_however_slow_it_is():
    line = Line(max_latency_s=0.001)
    line.pair(20.0)
    line.enter()
    assert line.admission.inside == 1
    with pytest.raises(RequestError, match="1 pictures before this one"):
        line.enter()


def test_one_more_is_tried_again_after_many_refusals_and_seldom():
    line = Line(max_latency_s=1.0)
    line.pair(1.2)  # a slow moment: two at once would take 1.2 s
    line.enter()
    refused = 0
    while line.admission.inside == 1 and refused < 10_000:
        try:
            line.enter()
        except RequestError:
            refused += 1
    assert 5_000 < refused < 10_000
    line.leave(0.2)
    line.leave(0.2)
    line.enter()
    line.enter()  # it was fast, so two go on being let in


def test_as_many_are_let_in_as_leave_within_the_bound():
    line = Line(max_latency_s=1.05)
    for _ in range(200):  # one picture leaves every 0.1 s while there are others
        line.pair(0.2)
    assert line.admission.expected_latency_s == pytest.approx(0.1, rel=0.01)
    refusal = line.fill()
    assert line.admission.inside == 10
    assert (refusal.status, refusal.code) == (429, "too_busy")


def test_bound_is_one_and_a_half_times_what_a_picture_takes_alone():
    line = Line()
    assert line.admission.bound_s is None
    line.alone(0.4)
    assert line.admission.bound_s == pytest.approx(0.6)
    for _ in range(200):
        line.alone(0.2)
    assert line.admission.bound_s == pytest.approx(0.3, rel=0.01)


def test_picture_that_had_company_says_nothing_of_the_time_alone():
    line = Line()
    line.alone(0.4)
    line.enter()
    line.enter()
    line.leave(5.0)
    line.leave(5.0)
    line.enter(2)
    line.leave(5.0)
    assert line.admission.bound_s == pytest.approx(0.6)


def test_picture_alone_says_nothing_of_how_many_can_be_done_at_once():
    line = Line(max_latency_s=1.0)
    line.pair(0.2)
    before = line.admission.expected_latency_s
    for _ in range(100):
        line.alone(9.0)
        line.clock.now += 100.0  # nor does an idle time
    assert line.admission.expected_latency_s == before


def test_time_before_the_second_came_counts_as_well():
    line = Line(max_latency_s=1.0)
    for _ in range(200):
        line.enter()
        line.clock.now += 0.09
        line.enter()
        line.leave(0.01)  # 0.1 s of work, whenever the second came
        line.leave(0.1)
    assert line.admission.expected_latency_s == pytest.approx(0.1, rel=0.01)


def test_request_of_many_pictures_counts_them_all_but_is_never_too_large_itself():
    line = Line(max_latency_s=1.0)
    line.pair(0.2)
    line.enter(500)
    assert line.admission.inside == 500
    assert line.fill().got.startswith("500 pictures")
    line.leave(50.0)
    assert line.admission.inside == 0
    assert line.admission.expected_latency_s == pytest.approx(0.1, rel=0.01)


def test_seconds_to_wait_are_what_is_too_much():
    line = Line(max_latency_s=1.0)
    line.pair(2.0)  # one a second
    line.enter(8)
    refusal = line.fill()
    assert refusal.retry_after_s == pytest.approx(9 * 1.0 - 1.0)
    assert refusal.headers() == {"Retry-After": "8"}


def test_picture_that_is_given_up_says_nothing_of_the_time_of_others():
    line = Line()
    line.alone(0.4)
    line.pair(0.2)
    before = line.admission.expected_latency_s, line.admission.bound_s
    for pictures in (1, 5):
        line.give_up(pictures, after_s=30.0)
    assert (line.admission.expected_latency_s, line.admission.bound_s) == before


def test_error_inside_counts_the_picture_out():
    line = Line(max_latency_s=1.0)
    with pytest.raises(KeyError), line.admission.admitted(3):
        raise KeyError
    assert line.admission.inside == 0
