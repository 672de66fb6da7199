"""Variants in turns: rates and ratios, and that one that fails does not stop the others."""

import argparse

import pytest

from benchmarks import turns


def variant(name: str, do: str = "measure", seconds: float = 1.0) -> turns.Variant:
    return turns.Variant(name, "tests.benchmarks.worker", {"do": do, "seconds": seconds})


def limits(minutes: float = 5, limit: float = 60) -> argparse.Namespace:
    return argparse.Namespace(minutes=minutes, limit=limit)


def test_a_variant_that_fails_is_named_and_the_others_go_on():
    variants = [variant("slow", seconds=4), variant("huge", "fill"), variant("wrong", "fail"), variant("quick")]
    found = turns.run_in_turns(variants, 2, limits())
    assert found["huge"] == "out of memory"
    assert found["wrong"] == "ValueError: no such attention"
    assert found["slow"].seconds == [4, 4]
    lines = turns.table(found, "slow")[2:]
    assert [line.split(" | ")[1] for line in lines] == ["4.000", *list(found.values())[1:3], "1.000"]
    assert lines[0].split(" | ")[4:7] == ["4.75", "1.00", "1.00"]  # pairs/s, their ratio, instructions/s
    assert lines[3].split(" | ")[4:7] == ["19.00", "4.00", "4.00"]
    assert "10.0%" in lines[3]  # of the peak rate
    assert all(line.count("|") == turns.table(found, "slow")[0].count("|") for line in lines)


def test_what_is_not_begun_in_time_is_left_out():
    found = turns.run_in_turns([variant("late")], 1, limits(minutes=0))
    assert found == {"late": "not begun: out of time"}


def test_a_process_is_stopped_at_its_limit():
    assert turns.run_in_turns([variant("long")], 1, limits(limit=0.01))["long"].startswith("stopped after")


class Accelerator:
    """A clock for a device that works through what is queued while the host goes on."""

    def __init__(self, dispatch: float, work: float, answer: float):
        self.dispatch, self.work, self.answer = dispatch, work, answer
        self.now = self.done = 0.0
        self.products = 0

    def product(self) -> None:
        self.products += 1
        self.now += self.dispatch
        self.done = max(self.done, self.now) + self.work

    def wait(self, results: list[None]) -> None:
        self.now = max(self.now, self.done) + self.answer


@pytest.mark.parametrize(
    ("work", "products"),
    [(186e-6, 2 + 7 * 16), (0.2, 2 + 7)],
    ids=["of an accelerator, shorter than its dispatch", "of a processor"],
)
def test_the_matrix_product_is_measured_and_not_its_dispatch(monkeypatch, work, products):
    device = Accelerator(dispatch=100e-6, work=work, answer=100e-6)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: device.now)
    speed = turns.matmul_speed(device.product, device.wait, 4096)
    assert speed == pytest.approx(2 * 4096**3 / work, rel=0.07)
    assert device.products == products  # a processor is not kept busy for longer than before


@pytest.mark.parametrize(
    ("status", "stderr", "reason"),
    [(-9, "", "out of memory"), (1, "", "ended with status 1"), (1, "Traceback\nKeyError: 'x'\n", "KeyError: 'x'")],
)
def test_reasons_are_one_line(status, stderr, reason):
    assert turns.why(status, stderr) == reason
