"""Performance models: exchanges simulated by hand, statistics, messages of codecs, fits that find planted values."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from planted import EFFICIENCY, ELEMENTS, LATENCY, make_point

from hvdlm.config import CommSection, CompressionSection
from hvdlm.config_reader import from_dict
from hvdlm.errors import HvdlmError
from hvdlm.gradients.auto.forecast import BackwardPass
from hvdlm.model.presets import PRESETS
from hvdlm.scaling.codec_messages import Message, messages
from hvdlm.scaling.commands import is_extrapolated, predict, with_speed, write_fit
from hvdlm.scaling.fit import fit
from hvdlm.scaling.forecast import forecast, local_interval
from hvdlm.scaling.forecast_options import ForecastOptions, parse_counts
from hvdlm.scaling.holdout import hold_out
from hvdlm.scaling.performance_model import Network, PerformanceModel, interval
from hvdlm.scaling.point import read_point, read_points, schema, write_record
from hvdlm.scaling.rank_speed import rank_speed
from hvdlm.scaling.scenario import of_config, of_point
from hvdlm.scaling.server_forecast import ServerForecast, forecast_servers, pulled_bytes
from hvdlm.scaling.simulation import BucketTimes, Cores, Stage, simulate
from hvdlm.scaling.statistics import expected_maximum, trimmed_mean

PLENTY = Cores(8, 0)


def test_one_bucket_is_exposed_by_what_the_backward_pass_does_not_hide() -> None:
    schedule = simulate(BackwardPass([1.0], 2.0), [[Stage("link", 3.0)]], 1, PLENTY)
    assert schedule.buckets == [BucketTimes(ready=1.0, start=1.0, end=4.0)]
    assert (schedule.backward_end, schedule.exposed, schedule.link_seconds) == (2.0, 2.0, 3.0)


def test_two_channels_share_the_link() -> None:
    stages = [[Stage("codec", 1.0), Stage("link", 3.0)]] * 2
    schedule = simulate(BackwardPass([1.0, 2.0], 2.0), stages, 2, PLENTY)
    # the first has the link alone from 2 to 3, then both share it: the last 2 s of the first take 4, then 1 is left
    assert [bucket.end for bucket in schedule.buckets] == [7.0, 8.0]
    assert (schedule.link_seconds, schedule.codec_seconds) == (6.0, 1.0)


def test_on_one_channel_the_next_bucket_waits() -> None:
    stages = [[Stage("latency", 0.5), Stage("link", 1.0)]] * 2
    schedule = simulate(BackwardPass([1.0, 1.0], 1.0), stages, 1, PLENTY)
    assert schedule.buckets == [BucketTimes(1.0, 1.0, 2.5), BucketTimes(1.0, 2.5, 4.0)]
    assert schedule.latency_seconds == 1.0


def test_a_codec_holds_up_a_backward_pass_on_the_same_core() -> None:
    schedule = simulate(BackwardPass([1.0, 2.0], 2.0), [[Stage("codec", 1.0)], []], 1, Cores(1, 1))
    assert schedule.buckets == [BucketTimes(1.0, 1.0, 3.0), BucketTimes(3.0, 3.0, 3.0)]
    assert schedule.backward_end == 3.0


def test_threads_that_drive_the_link_get_cores_first() -> None:
    schedule = simulate(BackwardPass([0.0], 1.0), [[Stage("link", 1.0, load=0.5)]], 1, Cores(1, 1))
    assert schedule.buckets[0].end == 1.0
    assert schedule.backward_end == pytest.approx(1.5)  # half a core for the first second


def test_a_link_is_slow_where_cores_cannot_drive_it() -> None:
    schedule = simulate(BackwardPass([0.0], 0.0), [[Stage("link", 1.0, load=0.9)]], 1, Cores(0.5, 0))
    assert schedule.end == pytest.approx(2.0)  # 0.9 cores wanted, 90% of a half there


def test_a_link_that_was_idle_bursts() -> None:
    stages = [[Stage("link", 1.0)], [Stage("link", 1.0)]]
    schedule = simulate(BackwardPass([0.0, 10.0], 10.0), stages, 1, PLENTY, burst=0.5)
    # at 50 times its speed until it has carried 0.5 s more than came meanwhile, then at its own
    bursting = 0.5 / 49
    assert schedule.buckets[0].end == pytest.approx(bursting + 1.0 - 50 * bursting)
    assert schedule.buckets[1].end - 10 == pytest.approx(schedule.buckets[0].end)  # it was idle long enough
    schedule = simulate(BackwardPass([0.0, 0.0], 0.0), stages, 1, PLENTY, burst=0.5)
    assert schedule.end == pytest.approx(bursting + 2.0 - 50 * bursting)


def test_trimmed_mean_by_hand() -> None:
    estimate = trimmed_mean([100.0, 3.0, 1.0, 2.0, 4.0])
    # 2, 3, 4 remain; winsorised 2, 2, 3, 4, 4 have deviation 1; 4.3027 is Student's 97.5% point on 2 degrees
    half = 4.302652729911275 * 1.0 / (3 / 5 * math.sqrt(5))
    assert estimate == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert trimmed_mean([5.0]) == (5.0, -math.inf, math.inf)


def test_expected_maximum() -> None:
    assert expected_maximum(1) == 0.0
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)
    assert expected_maximum(8) == pytest.approx(1.42360, rel=0.01)  # tables of normal order statistics
    assert expected_maximum(100) == pytest.approx(2.50759, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_a_ring_sends_all_but_its_part_twice(ranks: int) -> None:
    share = 2 * (ranks - 1) / ranks
    shapes = [[300, 100], [100]]
    settings = CompressionSection()
    (whole,) = messages("none", shapes, ranks, settings)
    assert whole == Message("all-reduce", pytest.approx(share * 4 * 30_100), 2 * (ranks - 1), 4 * 64 * 1024)
    assert whole.segment == pytest.approx(4 * 30_100 / ranks)  # less than 64 Ki numbers: one segment
    (halves,) = messages("fp16", shapes, ranks, settings)
    assert halves.nbytes == pytest.approx(share * (2 * 30_100 + 4))


def test_long_chunks_travel_in_segments() -> None:
    (message,) = messages("none", [[900, 1024]], 2, CompressionSection())
    assert (message.nbytes / message.hops, message.segment) == (2 * 900 * 1024, 4 * 64 * 1024)
    (message,) = messages("none", [[9000, 1024]], 2, CompressionSection())
    assert (message.nbytes / message.hops, message.segment) == (2 * 9000 * 1024, 4 * 64 * 1024)


def test_powersgd_sends_its_vectors_and_what_is_small() -> None:
    first, second = messages("powersgd", [[300, 100], [100]], 2, CompressionSection(matrix_rank=3))
    assert (first.nbytes, second.nbytes) == (4 * (3 * 300 + 100), 4 * 3 * 100)


@pytest.mark.parametrize("codec", ["none", "topk", "topk2", "powersgd", "int4", "int2"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_messages_of_tall_matrices_are_extrapolated_from_shorter_ones(
    codec: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [[4096, 256], [256], [2048, 1024]]
    settings = CompressionSection()
    extrapolated = messages(codec, shapes, ranks, settings)
    monkeypatch.setattr("hvdlm.scaling.codec_messages._MAX_ROWS", 10**6)
    whole = messages(codec, shapes, ranks, settings)
    assert [each.kind for each in extrapolated] == [each.kind for each in whole]
    assert [each.nbytes for each in extrapolated] == pytest.approx([each.nbytes for each in whole], rel=2e-3)


def test_one_rank_sends_nothing() -> None:
    assert messages("topk", [[300, 100]], 1, CompressionSection()) == []


PLANTED = [make_point(ranks, link) for link in (1e8, 1e9) for ranks in (1, 2, 4, 8)]


def test_a_fit_finds_what_was_planted() -> None:
    model = fit([point for point in PLANTED if point.ranks <= 2])
    assert model.inside is None and model.between is not None
    assert model.between.efficiency == pytest.approx(EFFICIENCY, rel=1e-3)
    assert model.between.latency == pytest.approx(LATENCY, rel=1e-2)
    assert (model.data_seconds, model.start_seconds, model.start_seconds_per_rank) == (0.01, 4.0, 1.0)
    for point in PLANTED:
        assert forecast(model, of_point(point)).seconds == pytest.approx(point.repetitions[0].seconds, rel=1e-3)


def test_what_is_held_out_is_not_fitted() -> None:
    odd = [*PLANTED[:3], make_point(8, 1e8, seconds=10.0), *PLANTED[4:]]
    by_name = {holdout.name: holdout for holdout in hold_out(odd)}
    four, eight, *links = by_name.values()
    assert [four.name[-7:], eight.name[-7:], len(links)] == ["4 ranks", "8 ranks", 2]
    assert four.mape < 1e-3  # not moved by the point of 8 ranks
    true = PLANTED[3].repetitions[0].seconds
    assert eight.residuals[0].error == pytest.approx(true / 10.0 - 1, abs=1e-3)


def test_a_fit_needs_points_that_fit() -> None:
    with pytest.raises(HvdlmError, match="codec none on the fewest ranks, and points of two ranks"):
        fit(PLANTED[:1])
    other = PLANTED[1].model_copy(update={"vocab_size": 50})
    with pytest.raises(HvdlmError, match="2 machines or models"):
        fit([PLANTED[0], other])
    wrong = PLANTED[1].repetitions[0].model_copy(update={"parameter_hashes": ["a", "b"]})
    with pytest.raises(HvdlmError, match="no valid point"):
        fit([PLANTED[1].model_copy(update={"repetitions": [wrong]})])


def test_points_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "a.point.json"
    write_record(file, PLANTED[1])
    assert read_point(file) == PLANTED[1]
    assert read_points(tmp_path) == [PLANTED[1]]
    content = json.loads(file.read_text())
    assert set(json.loads(schema())["required"]) <= content.keys()
    assert "lanes" in content and "laps" in content["repetitions"][0]  # the names of the file format, not of the code
    file.write_text(json.dumps({**content, "colour": "red"}))
    with pytest.raises(HvdlmError, match="not a point of version 1: colour"):
        read_point(file)
    with pytest.raises(HvdlmError, match="holds no points"):
        read_points(tmp_path / "empty")


def test_forecasts_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, point in enumerate([*PLANTED, make_point(2, 1e9, "fp16"), make_point(4, 1e9, "fp16")]):
        write_record(tmp_path / f"{index}.point.json", point)
    write_fit(tmp_path, tmp_path / "fit.json")
    assert "MAPE 0.0%" in capsys.readouterr().out
    options = ForecastOptions(
        ranks="8..64", ranks_per_host=1, link="10gbit", codecs=["none"], preset="tiny", batch_size_per_rank=4
    )
    predict(tmp_path / "fit.json", options)
    said = capsys.readouterr().out
    assert "extrapolated" in said and "links of twice the rate" in said and "codec fp16" in said
    assert "64 ranks take about 67 s to start" in said  # as planted: 3 s, and 1 s a rank
    two = replace(options, ranks="2", link="1mbit")
    predict(tmp_path / "fit.json", two)
    said = " ".join(capsys.readouterr().out.split())
    advice = r"hide the exchange: codec fp16 local_steps.every = \d+, fragments = 2, overlap = \d+: \+\d+%"
    assert re.search(advice, said)  # half the bytes, so half the steps
    predict(
        tmp_path / "fit.json",
        replace(two, overrides=["--local_steps.every", "auto", "--local_steps.fragments", "3"]),
    )
    said = capsys.readouterr().out
    assert re.search(r"codec none local_steps.every = \d+, fragments = 3, overlap = \d+", said)
    assert "ms since the start of the backward pass" not in said
    near = replace(options, ranks="8", ranks_per_host=8)  # on one host, where nothing was measured
    with pytest.raises(HvdlmError, match="the fit has no messages within a host"):
        predict(tmp_path / "fit.json", near)
    predict(tmp_path / "fit.json", replace(near, inside_link="100gbit"))
    assert re.search(r" 8 .* 9\d\.\d% ", capsys.readouterr().out)
    eight = replace(options, ranks="8", link=None, codecs=[])
    for bad, sentence in (
        ({"ranks_per_host": 0}, "--per-node 0"),
        ({"tokens_per_second": -1.0}, "--tokens-per-second -1"),
        ({"codecs": ["topk"]}, "codec topk was not measured: the fit knows fp16, none"),
        ({"codecs": ["fp16"], "device": "v100-sxm2", "mfu": 0.1}, "codec fp16 was measured on a CPU"),
        ({"overrides": ["--optimizer.algorithm", "dion"]}, "'dion' has no forecast"),
        ({"overrides": ["--optimizer.algorithm", "muon"]}, "'muon' has no forecast"),
        ({"overrides": ["--server.ranks", "2"], "search": True}, "server.ranks is forecast from measured ranks"),
        ({"overrides": ["--server.ranks", "8"]}, "server.ranks = 8 of 8 ranks leaves none to train"),
    ):
        with pytest.raises(HvdlmError, match=sentence):
            predict(tmp_path / "fit.json", replace(eight, **bad))  # type: ignore[arg-type]
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(HvdlmError, match="is no fit"):
        predict(tmp_path / "fit.json", eight)


def test_messages_within_a_host_have_a_network_of_their_own() -> None:
    """The rate between two ranks on one host is fitted on its own, as they use no link with a known rate."""
    place = PLANTED[1].place.model_copy(
        update={"hosts": ["a", "a"], "ranks_per_host": 2, "link_bits_per_second": None, "kind": "local"}
    )
    near = make_point(2, 3e9).model_copy(update={"place": place})
    model = fit([*PLANTED, near])
    assert model.inside is not None and model.between is not None
    assert model.between.efficiency == pytest.approx(EFFICIENCY, rel=1e-3)
    assert forecast(model, of_point(near)).seconds == pytest.approx(near.repetitions[0].seconds, rel=1e-3)


def test_hierarchical_exchange_uses_the_link_once_per_host() -> None:
    fast = Network(efficiency=1.0, latency=0.0, bits_per_second=1e15)
    model = fit(PLANTED).model_copy(update={"inside": fast})
    config = from_dict({"compression": {"hierarchical": True}}, "test", PRESETS)
    flat = config.model_copy(update={"compression": CompressionSection()})
    flat_step, hierarchical_step = (forecast(model, of_config(each, 257, 16, 8, 1e8)) for each in (flat, config))
    # of each bucket's bytes 2 * 15/16 are sent over the link, or 2 * 1/2
    assert hierarchical_step.schedule.link_seconds == pytest.approx(flat_step.schedule.link_seconds * 8 / 15, rel=1e-3)
    assert hierarchical_step.exposed < 0.6 * flat_step.exposed
    with pytest.raises(HvdlmError, match="the fit has no messages within a host"):
        forecast(fit(PLANTED), of_config(config, 257, 16, 8, 1e8))


def test_faster_ranks_show_more_of_the_exchange() -> None:
    model = fit(PLANTED)
    scenario = of_config(from_dict({"model": {"width": 512}}, "test", PRESETS), 257, 4, 1, 1e9)
    assert len(scenario.buckets) > 1
    speed = rank_speed(scenario.config, 257, None, None, scenario.tokens / 0.03)
    assert speed is not None
    slow, fast = forecast(model, scenario), forecast(with_speed(model, speed), scenario)
    assert fast.optimizer == fast.data == 0  # what a rank is measured to attain includes these
    assert fast.forward + fast.backward == pytest.approx(0.03)
    assert fast.forward / fast.backward == pytest.approx(0.5)
    # of the exchange, what the shorter backward pass no longer hides
    assert slow.exposed < fast.exposed < slow.exposed + slow.backward - fast.backward + 1e-9


def test_auto_is_forecast_in_the_buckets_of_what_it_chooses() -> None:
    fitted = fit(PLANTED)
    far = Network(efficiency=1.0, latency=0.5, bits_per_second=None)  # so that few buckets are sooner
    codecs = {**fitted.codecs, "topk": fitted.codecs["none"]}
    model = fitted.model_copy(update={"codecs": codecs, "between": far})
    settings = {"model": {"width": 512}, "compression": {"codec": "auto", "candidates": "none,topk"}}
    config = from_dict(settings, "test", PRESETS)
    scenario = of_config(config, 257, 4, 1, 1e6)
    none, topk, auto = (forecast(model, scenario.with_compression(codec=name)) for name in ("none", "topk", "auto"))
    assert len(topk.elements) < len(none.elements)  # 32 and 4 MiB
    assert auto == topk and topk.seconds < none.seconds


def test_local_steps_by_hand() -> None:
    """Nobody is slower than others here, cores are plenty and codec none computes nothing."""
    model = fit(PLANTED)
    scenario = of_config(from_dict({}, "test", PRESETS), 257, 4, 1, 1e7)
    elements = sum(scenario.elements)

    def seconds(model: PerformanceModel = model, **settings: object) -> float:
        return forecast(model, scenario.with_local_steps(**settings)).seconds

    alone = forecast(model, replace(scenario, ranks=1)).seconds
    round_ = (seconds(every=4) - alone) * 4  # waited for once in four steps
    # 2 * 3/4 of the bytes, and the last segments
    assert round_ == pytest.approx(1.5 * 4 * elements * 8 / (EFFICIENCY * 1e7), rel=0.1)
    assert seconds(every=8) == pytest.approx(alone + round_ / 8)
    hiding = math.ceil(round_ / alone)
    assert seconds(every=hiding, overlap=hiding) == pytest.approx(alone)
    assert seconds(every=8, overlap=2) == pytest.approx(alone + (round_ - 2 * alone) / 8)
    assert seconds(every=1, overlap=1) == pytest.approx(round_)  # the link is never idle
    merges = model.model_copy(update={"merge_seconds_per_element": 1e-6})
    assert seconds(merges, every=hiding, overlap=hiding) == pytest.approx(alone + 1e-6 * elements / hiding)
    assert seconds(every="auto") == pytest.approx(alone)
    every, overlap = local_interval(model, scenario.with_local_steps(every="auto", fragments=2))
    assert (every - 1) * 0.9 * alone < round_ <= every * 0.9 * alone and overlap == math.ceil(every / 2)


def test_parameter_servers_by_hand() -> None:
    """One bucket, so that nothing is hidden; codec none computes nothing, and nobody is slower than others."""
    model = fit(PLANTED)
    rate = EFFICIENCY * 1e8 / 8  # bytes/s
    update = 0.03 / ELEMENTS  # seconds a number, as planted

    def step(**server: object) -> ServerForecast:
        settings = {"server": {"ranks": 2, **server}, "comm": {"bucket_mb": 1e3}}
        return forecast_servers(model, of_config(from_dict(settings, "test", PRESETS), 257, 6, 1, 1e8))

    found = step()
    nbytes = found.pushed_bytes
    assert nbytes == found.pulled_bytes == 4 * sum(of_config(from_dict({}, "test", PRESETS), 257, 1, 1, 1e8).elements)
    # Each of two servers gets half of what four workers send, and sends them as much
    assert found.pushing == pytest.approx(2 * nbytes / rate + LATENCY)
    assert found.pulling == pytest.approx(2 * nbytes / rate + LATENCY)
    assert found.update == pytest.approx(update * nbytes / 4 / 2 + 3 * LATENCY)
    alone = forecast(model, of_config(from_dict({}, "test", PRESETS), 257, 1, 1, 1e8))
    passes = alone.seconds - alone.optimizer
    assert found.seconds == pytest.approx(passes + found.pushing + found.pulling + found.update)
    four = step(ranks=4)  # for two workers: then it is these that send and receive all of it
    assert [four.pushing, four.pulling] == pytest.approx([nbytes / rate + LATENCY] * 2)
    assert step(pull="bf16").pulling == pytest.approx(nbytes / rate + LATENCY)
    # Those that do not wait for one another have the link to themselves, unless it is always busy
    late = step(max_staleness=4)
    own = passes + 2 * (nbytes / rate + LATENCY) + late.update
    assert late.seconds == pytest.approx(max(own, 2 * nbytes / rate))
    slow = model.model_copy(update={"between": Network(efficiency=0.01, latency=LATENCY, bits_per_second=None)})
    settings = from_dict({"server": {"ranks": 1, "max_staleness": 4}}, "test", PRESETS)
    saturated = forecast_servers(slow, of_config(settings, 257, 6, 1, 1e8))
    assert saturated.seconds == pytest.approx(5 * nbytes / (0.01 * 1e8 / 8))
    # With local steps they push and pull once in a round, and the update of each step is theirs
    local = from_dict(
        {"server": {"ranks": 2, "max_staleness": 4}, "local_steps": {"every": 8}, "comm": {"bucket_mb": 1e3}},
        "test",
        PRESETS,
    )
    rounds = forecast_servers(model, of_config(local, 257, 6, 1, 1e8))
    assert rounds.update == pytest.approx(update * nbytes / 4)
    assert rounds.seconds == pytest.approx(passes + rounds.update + 2 * (nbytes / rate + LATENCY) / 8)
    assert [rounds.pushed_bytes, rounds.pulled_bytes] == [nbytes / 8] * 2
    busy = forecast_servers(slow, of_config(local, 257, 102, 1, 1e8))  # 100 workers
    assert busy.seconds == pytest.approx(50 * nbytes / 8 / (0.01 * 1e8 / 8))


def test_servers_send_in_16_bits_what_products_round() -> None:
    def pulled(every: int = 0, **train: object) -> float:
        sections = {"server": {"ranks": 1, "max_staleness": 4}, "local_steps": {"every": every}}
        settings = from_dict({**sections, "train": train}, "test", PRESETS)
        return pulled_bytes(of_config(settings, 257, 2, 1, 1e9))

    scenario = of_config(from_dict({}, "test", PRESETS), 257, 2, 1, 1e9)
    shape = scenario.config.model
    matrices = shape.layers * 12 * shape.width**2  # and their biases
    rounded = (pulled(precision="fp32") - pulled(precision="bf16")) / 2
    assert matrices < rounded <= matrices + shape.layers * 9 * shape.width
    assert pulled(every=4, precision="bf16") == pulled(precision="fp32")  # which a round's own steps need


def test_servers_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, point in enumerate(PLANTED):
        write_record(tmp_path / f"{index}.point.json", point)
    write_fit(tmp_path, tmp_path / "fit.json")
    capsys.readouterr()
    options = ForecastOptions(ranks="4,6", ranks_per_host=1, link="1gbit", overrides=["--server.ranks", "2"])
    predict(tmp_path / "fit.json", options)
    said = capsys.readouterr().out
    assert "codec none, 2 parameter servers" in said and "of all-reduce" in said
    assert re.search(r"With 4 workers, twice as many servers would change tokens/s by \+\d+%", said)
    assert re.search(r"Intervals are those of all-reduces", said)
    rounds = ["--server.ranks", "2", "--server.max_staleness", "4", "--local_steps.every", "8"]
    predict(tmp_path / "fit.json", replace(options, overrides=rounds))
    said = capsys.readouterr().out
    assert "2 asynchronous parameter servers, local_steps.every = 8" in said and "of averages" in said


def test_a_fit_to_local_steps() -> None:
    repetition = PLANTED[1].repetitions[0]
    phases = [{**each, "wait": 0.02} for each in repetition.phase_seconds]
    local_steps = {**PLANTED[1].settings, "local_steps": {"every": 4, "fragments": 1, "overlap": 4}}
    update = {"settings": local_steps, "codec": "none/4/1/4"}
    own = [repetition.model_copy(update={"phase_seconds": phases, "seconds": 0.34 + 0.02})]
    point = PLANTED[1].model_copy(update={**update, "repetitions": own})
    assert (point.codec_name, point.every, PLANTED[1].every) == ("none", 4, 1)
    model = fit([*PLANTED, point])
    assert model.merge_seconds_per_element == pytest.approx(4 * 0.02 / ELEMENTS)  # waited in each of four steps
    assert list(model.codecs) == ["none"]


def test_ranges() -> None:
    model = fit(PLANTED).model_copy(update={"residual": 0.01})
    assert parse_counts("8..70") == [8, 16, 32, 64]
    assert parse_counts("3,5") == [3, 5]
    assert parse_counts("8..8") == [8]
    for text in ("8..x", "", "0", "0..8", "-1..8", "8..2", "65536", "8..999999999"):
        with pytest.raises(HvdlmError, match="--ranks"):
            parse_counts(text)
    assert not is_extrapolated(model, 32, 1e9) and is_extrapolated(model, 33, 1e9)
    assert not is_extrapolated(model, 2, 4e9) and is_extrapolated(model, 2, 5e9) and is_extrapolated(model, 2, 2e7)
    assert interval(model, 8) == pytest.approx(math.exp(0.02))
    assert interval(model, 32) == pytest.approx(math.exp(0.06))


def test_buckets_of_a_model_without_memory() -> None:
    config = from_dict({"model": {"preset": "llama-8b"}, "comm": CommSection().model_dump()}, "test", PRESETS)
    scenario = of_config(config, 128256, 8, 8, None)
    assert sum(scenario.elements) == 8_030_261_248  # the model card's 8.03B
