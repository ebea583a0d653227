"""Runs whose ranks read copies of shards on a disk of their host: the same run, and what they say of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from disks import flip_bit
from jobs import Ranks, assert_bit_identical, command, losses, records
from launcher import launcher_command, run


def test_a_run_from_copies_is_the_same_run(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """One that makes them, one that finds them all, and one that finds a bit flipped in each."""
    assert ranks.train(2, small_data, tmp_path / "plain" / "run").status == 0
    cache = tmp_path / "cache"
    for name in ("makes", "finds", "finds flipped"):
        result = ranks.train(2, small_data, tmp_path / name / "run", data__cache=cache)
        assert result.status == 0, result.output
        assert_bit_identical(tmp_path / "plain" / "run", tmp_path / name / "run")
        assert ("it is made again from" in result.output) == (name == "finds flipped")
        hits = [float(str(record["cache_hits"])) for record in records(tmp_path / name / "run")]
        assert all(0 <= share <= 1 for share in hits) and hits[-1] > 0
        if name == "finds":
            assert hits[-1] == 1
        (directory,) = cache.iterdir()
        for shard in small_data.rglob("shard_*.h5"):  # those that the run has ended before
            shutil.copy(shard, directory / shard.relative_to(small_data))
            if name == "finds":
                flip_bit(directory / shard.relative_to(small_data))


def test_a_resumed_run_goes_on_from_copies(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    whole, stopped, cache = tmp_path / "whole" / "run", tmp_path / "stopped" / "run", tmp_path / "cache"
    assert ranks.train(2, small_data, whole).status == 0
    assert ranks.train(2, small_data, stopped, stop_after=20, data__cache=cache).status == 75
    assert ranks.train(2, small_data, stopped, "--resume", "latest", data__cache=cache).status == 0
    assert losses(whole) == losses(stopped)


def test_a_disk_that_one_rank_has_not(small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    words = command(small_data, tmp_path / "run", data__cache=f"{tmp_path}/$OMPI_COMM_WORLD_RANK")
    result = run([*launcher_command("mpirun", 2), *words])
    assert result.status not in (0, 75)
    said = rf"rank 1 .*data.cache: nothing can be written to {tmp_path}/1/\w+ \(.*\); name a directory on a disk"
    assert re.search(said, result.output), result.output
    assert not (tmp_path / "run").exists()
