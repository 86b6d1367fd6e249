"""The log that ``make gpu-test`` writes: what passed, what failed, and that a time limit ended it."""

from gpu.run import report

WORKERS = "3 workers [4 items]\n\n"
PASSED = "[gw0] [ 25%] PASSED tests/gpu/test_x.py::test_one[a-1] \n"
FAILED = "[gw2] [ 50%] FAILED tests/gpu/test_x.py::test_two \n"
SUMMARY = "FAILED tests/gpu/test_x.py::test_two - AssertionError: differs\n"


def test_everything_passed():
    assert report("x", WORKERS + 4 * PASSED, 0, 61.2) == (True, "  test_x.py: 4 passed in 61 s")


def test_failures_are_named_with_their_reason():
    good, text = report("x", WORKERS + PASSED + FAILED + SUMMARY, 1, 3.0)
    assert not good and text.splitlines() == [
        "  test_x.py: 1 passed, 1 failed in 3 s",
        "    failed: tests/gpu/test_x.py::test_two - AssertionError: differs",
    ]


def test_what_the_time_limit_cut_off_is_no_success():
    good, text = report("x", WORKERS + PASSED + FAILED, None, 600.0)
    assert not good and "1 passed, 1 failed in 600 s; stopped by the time limit of 4\n" in text
    assert text.endswith("failed: tests/gpu/test_x.py::test_two")


def test_a_pytest_that_never_began_is_no_success():
    good, text = report("x", "INTERNALERROR no such option\n", 4, 1.0)
    assert not good and "none ran" in text and "code 4" in text and "no such option" in text
