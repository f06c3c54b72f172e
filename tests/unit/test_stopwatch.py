"""What a stage takes."""

from __future__ import annotations

import time

import pytest
import torch

from ltx_batch.model.pipeline import Stopwatch


def test_a_stage_that_fails_takes_its_time_too() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(MemoryError), watch.stage("decode"):
        time.sleep(0.02)
        raise MemoryError
    first_s = watch.seconds["decode"]
    with watch.stage("decode"):
        time.sleep(0.02)
    assert 0.02 <= first_s < first_s + 0.02 <= watch.seconds["decode"] and watch.at == "decode"
