"""The watchdog over what a rank does: it speaks once, in time, and only of what has a limit."""

from __future__ import annotations

import threading
import time

from hvdlm.comm.activity import Activity, Watchdog, is_waiting


def watched(activity: Activity, timeout: float) -> tuple[Watchdog, list[str], threading.Event]:
    said: list[str] = []
    spoken = threading.Event()

    def on_stuck(doing: str) -> None:
        said.append(doing)
        spoken.set()

    return Watchdog(activity, timeout, on_stuck), said, spoken


def test_what_takes_too_long_is_told_once() -> None:
    activity = Activity()
    _, said, spoken = watched(activity, 1.0)
    activity.begin("computes step 3")
    assert spoken.wait(30)
    time.sleep(1.5)
    assert said == ["computes step 3, for 1 s"]


def test_what_goes_on_or_has_no_limit_is_not_told() -> None:
    activity = Activity()
    watchdog, said, spoken = watched(activity, 1.0)
    for step in range(20):
        activity.begin(f"computes step {step}")
        time.sleep(0.1)
    activity.idle()
    assert not spoken.wait(2)
    with activity.within("waits for files", 100.0):
        assert not spoken.wait(2)
        assert is_waiting(watchdog.doing())
    watchdog.close()
    activity.begin("computes step 21")
    assert not spoken.wait(2)
    assert said == []
