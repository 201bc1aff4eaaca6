"""Where the time of a batch goes: what is counted as which stage."""

from __future__ import annotations

import time

import pytest

from xkd_fast.data.stage_times import StageTimes


def test_waiting_for_a_gpu_is_shared_out_by_its_own_clock() -> None:
    """Red if a slow decoder on a GPU is told as slow augmentation, behind which its work is waited for."""
    times = StageTimes()
    begun = time.perf_counter()
    with times.of_waiting(lambda: {"decode": 0.3, "copy": 0.0, "augment": 0.1}):
        time.sleep(0.2)
    waited = time.perf_counter() - begun
    seconds, _ = times.read()
    assert sum(seconds.values()) == pytest.approx(waited, abs=0.01) and waited > 0.19
    assert seconds["decode"] == pytest.approx(3 * seconds["augment"]) and seconds["copy"] == seconds["read"] == 0.0


def test_a_wait_in_which_nothing_was_done_is_nobodys_alone() -> None:
    """Red if a GPU that was done before ends the run with a division by zero."""
    times = StageTimes()
    with times.of_waiting(lambda: {"decode": 0.0, "augment": 0.0}):
        time.sleep(0.02)
    seconds, _ = times.read()
    assert seconds["decode"] == seconds["augment"] > 0.009
