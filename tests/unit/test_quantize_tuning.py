"""Which launch a kernel takes: what fits a GPU, what is fastest, and what is remembered by many processes."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize.kernels import tune
from ltx_batch.model.quantize.kernels.product import TILES, adjacent
from ltx_batch.model.quantize.kernels.product import tuner as product_tuner
from ltx_batch.model.quantize.kernels.rows import row_bytes
from ltx_batch.model.quantize.kernels.rows import tuner as row_tuner
from ltx_batch.model.quantize.kernels.start import building, only_building
from ltx_batch.model.quantize.kernels.store import read_choice, write_choice
from ltx_batch.model.quantize.kernels.tune import Tuner, bucket

GPU = torch.device("cuda", 0)
LIMITS_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}


@dataclass(frozen=True, slots=True)
class Way:
    number: int
    shared: int = 0

    def shared_bytes(self, capability: tuple[int, int]) -> int:
        return self.shared


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, float]:
    """A GPU of 100 bytes of shared memory on which launches take as long as they say: {number: seconds}."""
    times: dict[int, float] = {}
    monkeypatch.setattr(tune, "limits", lambda device: ((9, 0), 100))
    monkeypatch.setattr(tune, "median_s", lambda run, device: times[int(run()[0])])
    monkeypatch.setattr(tune, "store_path", lambda device: tmp_path / "gpu.json")
    return times


def answer(way: Way) -> torch.Tensor:
    return torch.tensor([float(way.number), 1e6])


# what fits


@pytest.mark.parametrize(("capability", "kib"), LIMITS_KIB.items())
def test_every_gpu_has_tiles_that_fit(capability: tuple[int, int], kib: int) -> None:
    hopper = capability[0] == 9
    fitting = product_tuner(described=hopper).fitting(capability, kib * 1024)
    assert len(fitting) >= 8
    assert any(tile.described for tile in fitting) == hopper
    assert all(tile.shared_bytes(capability) <= kib * 1024 for tile in fitting)
    for channels, lines in ((2048, False), (4096, False), (4096, True), (8192, False), (16384, False)):
        assert len(row_tuner(row_bytes(channels, lines=lines)).fitting(capability, kib * 1024)) >= 4


def test_large_tiles_are_for_gpus_with_room() -> None:
    large = next(tile for tile in TILES if (tile.rows, tile.columns, tile.stages, tile.described) == (128, 256, 4, 1))
    assert large in product_tuner(described=True).fitting((9, 0), 227 * 1024)
    assert large not in product_tuner(described=True).fitting((9, 0), 163 * 1024)


@pytest.mark.parametrize(("rows", "found"), [(1, 1), (2, 2), (3, 4), (4096, 4096), (13376, 16384)])
def test_row_counts_share_choices(rows: int, found: int) -> None:
    assert bucket(rows) == found


def test_weights_behind_each_other_are_known() -> None:
    whole = torch.empty(6, 8, dtype=torch.int8)
    one, two, three = whole.split(2)
    assert adjacent([one, two, three]) and adjacent([one])
    assert not adjacent([one, three, two]) and not adjacent([one, two, three.clone()])


# what is chosen


def test_the_fastest_that_fits_is_chosen_once_and_remembered(timed: dict[int, float], tmp_path: Path) -> None:
    timed |= {1: 3.0, 2: 2.0, 3: 1.0}
    ways = [Way(1), Way(2), Way(3, shared=101)]
    launched: list[int] = []

    def run(way: Way) -> torch.Tensor:
        launched.append(way.number)
        return answer(way)

    tuner = Tuner("some", ways)
    assert tuner.choose(GPU, (4, 5), run) == tuner.choose(GPU, (4, 5), run) == Way(2)
    assert set(launched) == {1, 2}
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"some": {"4x5": {"number": 2, "shared": 0}}}
    launched.clear()
    assert Tuner("some", ways).choose(GPU, (4, 5), run) == Way(2)  # another process
    assert launched == []
    ways = [Way(1), Way(4)]  # no such way now
    assert Tuner("some", ways).choose(GPU, (4, 5), lambda way: answer(Way(1))) == Way(1)


def test_wrong_and_broken_ways_are_left_out(timed: dict[int, float], caplog: pytest.LogCaptureFixture) -> None:
    timed |= {1: 3.0, 2: 2.0, 3: 1.0}

    def run(way: Way) -> torch.Tensor:
        if way.number == 2:
            raise RuntimeError("out of resources")
        return answer(way) if way.number == 1 else 2 * answer(way)

    assert Tuner("some", [Way(1), Way(2), Way(3)]).choose(GPU, (1,), run) == Way(1)
    assert "out of resources" in caplog.text and "computes something else" in caplog.text


@pytest.mark.parametrize("written", ["nothing", "something else"])
def test_a_way_that_writes_where_the_others_wrote_is_still_found_wrong(timed: dict[int, float], written: str) -> None:
    timed |= {1: 3.0, 2: 2.0}
    out = torch.zeros(2)

    def run(way: Way) -> torch.Tensor:
        if way.number == 1:
            return out.copy_(answer(way))
        return out if written == "nothing" else out.copy_(2 * answer(way))

    assert Tuner("some", [Way(1), Way(2)]).choose(GPU, (1,), run) == Way(1)


def test_all_that_fit_are_compiled_before_one_is_timed(timed: dict[int, float]) -> None:
    timed |= {1: 3.0, 2: 2.0}
    seen: list[str] = []

    def run(way: Way) -> torch.Tensor:
        seen.append(f"{'build' if building() else 'run'} {way.number}")
        return answer(way)

    ways = [Way(1), Way(2), Way(3, shared=101)]
    Tuner("some", ways).choose(GPU, (1,), run)
    assert seen[:3] == ["build 1", "build 2", "run 1"]


def test_while_kernels_are_built_nothing_is_chosen(timed: dict[int, float], tmp_path: Path) -> None:
    timed |= {1: 3.0, 2: 2.0}
    seen: list[int] = []

    def run(way: Way) -> torch.Tensor:
        seen.append(way.number)
        if way.number == 1:
            raise RuntimeError("what the binder refuses")
        return answer(way)

    tuner = Tuner("some", [Way(1), Way(2), Way(3, shared=101)])
    with only_building():
        tuner.choose(GPU, (1,), run)
    assert seen == [1, 2] and not (tmp_path / "gpu.json").exists()
    assert tuner.choose(GPU, (1,), run) == Way(2)
    seen.clear()
    with only_building():
        assert tuner.choose(GPU, (1,), run) == Way(2)
    assert seen == [], "a choice is known: it is for the caller to build"


def test_no_way_at_all_is_an_error_with_a_way_out(timed: dict[int, float]) -> None:
    def run(way: Way) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    with pytest.raises(
        PrecisionError, match=r"no launch of some runs on this GPU; use precision bf16.*no kernel image"
    ):
        Tuner("some", [Way(1)]).choose(GPU, (1,), run)


def test_no_memory_is_no_fault_of_a_way(timed: dict[int, float]) -> None:
    def run(way: Way) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Tuner("some", [Way(1)]).choose(GPU, (1,), run)


# what is stored


def test_choices_of_many_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    for number in range(4):
        for shape in range(25):
            assert read_choice(path, f"kernel{number}", str(shape)) == {"number": shape}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["gpu.json", "gpu.lock"]


def write_many(path: Path, number: int) -> None:
    for shape in range(25):
        write_choice(path, f"kernel{number}", str(shape), {"number": shape})


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"some": {"1": 5}}'])
def test_a_broken_store_is_as_an_empty_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    assert read_choice(path, "some", "1") is None
    write_choice(path, "other", "1", {"number": 1})
    assert read_choice(path, "other", "1") == {"number": 1}


def test_a_disk_that_takes_nothing_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_choice(tmp_path / "file" / "gpu.json", "some", "1", {"number": 1})
    assert read_choice(tmp_path / "file" / "gpu.json", "some", "1") is None
