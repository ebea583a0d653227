"""Forecasts of layouts worked out by hand, published runs, and what `hvdlm predict` prints of layouts."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from planted import make_point
from shapes import GPT2, preset

import published_runs as page_of_published_runs
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.devices import DEVICES, device_named, device_of_chip
from hvdlm.errors import HvdlmError
from hvdlm.model.layout import Layout
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import flops_per_token, parameter_count
from hvdlm.scaling.cluster import Cluster, Link
from hvdlm.scaling.commands import predict
from hvdlm.scaling.fit import fit
from hvdlm.scaling.forecast_options import ForecastOptions
from hvdlm.scaling.layout_commands import forecast_cluster
from hvdlm.scaling.layout_forecast import LayoutScenario, forecast_layout, moved_bytes_per_token, utilisation
from hvdlm.scaling.layout_search import choice, layouts, search
from hvdlm.scaling.point import write_record
from hvdlm.scaling.published_runs import RUNS, cluster_of, residuals, spread
from hvdlm.scaling.rank_speed import rank_speed

# Ranks of 1 GFLOP/s, 4 a host; within a host 1 GB/s each, and 100 MB/s of each host; nothing else takes time
CLUSTER = Cluster(1e9, math.inf, 0.0, 4, Link(1e9, 0.0), Link(1e8, 0.0))
SLOW = Cluster(1e9, math.inf, 0.0, 4, Link(1e9, 1e-3), Link(1e8, 1e-2))
MODEL = GPT2.model_copy(update={"layers": 4})
NUMBERS = parameter_count(MODEL, 100)
FLOPS = flops_per_token(MODEL, 100)


def scenario(layout: Layout, sequences: int, **options: object) -> LayoutScenario:
    """`sequences` of 32 tokens in a step, one at once."""
    return LayoutScenario(MODEL, 100, layout, sequences, 1, **options)  # type: ignore[arg-type]


# ---- links


def test_a_gather_within_a_host() -> None:
    assert CLUSTER.gather(8e9, 4, 1) == pytest.approx(8 * 3 / 4)
    assert SLOW.gather(8e9, 4, 1, messages=5) == pytest.approx(6 + 5 * 3 * 1e-3)
    assert CLUSTER.gather(8e9, 1, 1) == 0


def test_a_gather_between_hosts_crosses_each_link_once() -> None:
    assert CLUSTER.gather(8e9, 8, 1) == pytest.approx(80 * 7 / 8)
    # one of four hops goes to another host
    assert SLOW.gather(8e9, 8, 1) == pytest.approx(70 + 7 * (1e-2 + 3e-3) / 4)


def test_groups_that_are_far_apart_share_a_host_s_link() -> None:
    """Groups of one rank a host: four of them exchange at the same time; of two a host: two."""
    assert CLUSTER.gather(8e9, 2, 4) == pytest.approx(4 * 80 / 2)
    assert CLUSTER.gather(8e9, 4, 2) == pytest.approx(2 * 80 * 3 / 4)
    assert CLUSTER.message(1e8, 4) == pytest.approx(4)
    assert CLUSTER.message(1e8, 2) == pytest.approx(0.1)


def test_an_emulated_link_that_was_idle_carries_a_burst() -> None:
    bursts = replace(CLUSTER, burst=1e8)  # a second of the link between hosts
    assert bursts.reduction(8e9, 8, 1) == pytest.approx(CLUSTER.reduction(8e9, 8, 1) - 1)
    assert bursts.reduction(8e9, 4, 1) == CLUSTER.reduction(8e9, 4, 1) == 2 * CLUSTER.gather(8e9, 4, 1)
    assert bursts.message(1e8, 4) == pytest.approx(CLUSTER.message(1e8, 4) - 1)
    assert bursts.message(1e6, 4) == bursts.reduction(0, 8, 1) == 0


def test_a_core_moves_what_goes_through_shared_memory() -> None:
    on_cpus = replace(CLUSTER, device="cpu", core_seconds_per_byte=1e-9)
    assert on_cpus.gather_core_seconds(8e9, 8, 1) == pytest.approx(7.0)  # to other hosts
    assert on_cpus.gather_core_seconds(8e9, 4, 1) == pytest.approx(6e9 * 1e-9)  # at the speed of the link, 1 GB/s
    fast = replace(on_cpus, inside=Link(1e11, 0.0))
    assert fast.gather_core_seconds(8e9, 4, 1) == pytest.approx(6e9 * 0.6e-9)
    assert CLUSTER.gather_core_seconds(8e9, 4, 1) == 0


# ---- steps


def test_one_rank_computes() -> None:
    step = forecast_layout(scenario(Layout(), 3), CLUSTER)
    assert step.seconds == step.compute == pytest.approx(3 * 32 * FLOPS / 1e9)
    assert utilisation(scenario(Layout(), 3), step.seconds, 2e9) == pytest.approx(0.5)


def test_a_pass_between_products_waits_for_memory() -> None:
    """Of a token and a block 8 x 64 + 2 x 2 x 64 + 2 x 768 = 2304 bytes are moved five times."""
    fed = replace(CLUSTER, memory_bandwidth=1e9, optimizer_seconds=1e-8)
    step = forecast_layout(scenario(Layout(), 1), fed)
    assert step.compute == pytest.approx(32 * (FLOPS + 5 * 4 * 2304) / 1e9)
    assert step.optimizer == pytest.approx(1e-8 * NUMBERS)
    assert forecast_layout(scenario(Layout(1, shard=4), 4), fed).optimizer == pytest.approx(1e-8 * NUMBERS / 4)


def test_recomputation_leaves_out_the_last_product_of_a_block() -> None:
    """That is 4 x 64 x 64 of 12 x 64 x 64."""
    whole, block, none = (
        forecast_layout(scenario(Layout(), 1, recomputed=kind), CLUSTER).compute for kind in ("whole", "block", "none")
    )
    assert whole == pytest.approx(none * 4 / 3)
    assert block == pytest.approx(none * (3 + 2 / 3) / 3)


def test_tensor_ranks_wait_for_four_all_reduces_of_a_block() -> None:
    step = forecast_layout(scenario(Layout(tensor=2), 1), CLUSTER)
    assert step.compute == pytest.approx(32 * FLOPS / 2 / 1e9)
    # in 16 bits 2 x 1/2 of 2 x 32 x 64 bytes each, and one each at the embedding and at the output projection
    assert step.tensor == pytest.approx((4 * 4 + 2) * 2 * 32 * 64 / 1e9)
    again = forecast_layout(scenario(Layout(tensor=2), 1, recomputed="block"), CLUSTER)
    assert again.tensor == pytest.approx((4 * 5 + 2) * 2 * 32 * 64 / 1e9)


def test_a_pipeline_s_bubble_is_what_other_stages_take_for_a_micro_batch() -> None:
    fast = replace(CLUSTER, inside=Link(math.inf, 0.0))
    deep = scenario(Layout(pipeline=4), 8)
    step = forecast_layout(deep, fast)
    block = (FLOPS - 6 * 6400) / 4 * 32 / 1e9
    slowest = block + 6 * 6400 * 32 / 1e9  # the last one, with the output projection
    assert step.compute == pytest.approx(8 * slowest)
    assert step.bubble == pytest.approx(3 * block)
    for schedule, share in (("zero_bubble", 1 / 3), ("interleaved", 1 / 2)):
        other = replace(deep, layout=replace(deep.layout, schedule=schedule, chunks=2))  # type: ignore[arg-type]
        assert forecast_layout(other, fast).bubble == pytest.approx(step.bubble * share)
    # in fp32, three times to the last stage and three times back
    assert forecast_layout(deep, CLUSTER).bubble - step.bubble == pytest.approx(6 * 4 * 32 * 64 / 1e9)


def test_a_pipeline_waits_for_messages_with_few_micro_batches_under_way() -> None:
    """On a link so slow that passes take next to nothing: 8 micro-batches of 32 tokens through 4 stages and back."""
    slow = replace(CLUSTER, inside=Link(1e3, 0.0))
    message = 4 * 32 * 64 / 1e3
    for schedule, at_once in (("1f1b", 4), ("eager_1f1b", 7), ("gpipe", 8)):
        layout = Layout(pipeline=4, schedule=schedule)  # type: ignore[arg-type]
        waited = 6 * message + (8 - at_once) * 6 * message / at_once
        assert forecast_layout(scenario(layout, 8), slow).seconds == pytest.approx(waited, rel=1e-2)


def test_weights_of_stages_1_and_2_come_back_beside_the_next_forward_pass() -> None:
    """In 16 bits 2 x 1/2 bytes a number; gradients in float32, on a link on which a pass hides neither."""
    step = forecast_layout(scenario(Layout(1, shard=2), 2), replace(CLUSTER, flops=1e12, inside=Link(1e6, 0.0)))
    forward = 32 * FLOPS / 1e12 / 3
    assert step.exposed == pytest.approx(NUMBERS * (2 + 1) / 1e6 - 3 * forward * 3 / 4)  # beside three of four blocks
    slow_passes = replace(CLUSTER, flops=1e6, inside=Link(1e6, 0.0))  # one block's part of each is left
    step = forecast_layout(scenario(Layout(2, shard=2), 2), slow_passes)
    assert step.exposed == pytest.approx(NUMBERS * (2 + 1) / 1e6 / 4)


def test_cores_that_send_do_not_compute() -> None:
    """Two hosts of a rank each: 2 bytes a number for gradients, 1 for weights, at 1 ns of a core; within a host a core
    moves them at the speed of the link.
    """
    hosts = replace(CLUSTER, flops=1e6, ranks_per_host=1, device="cpu", core_seconds_per_byte=1e-6)
    step = forecast_layout(scenario(Layout(1, shard=2), 2), hosts)
    of_byte = 3 / 4 * 1e-6 + 1 / 4 / 1e8  # one of four blocks' messages go on beside no pass
    assert step.exposed == pytest.approx(NUMBERS * (2 + 1) * of_byte)
    assert forecast_layout(scenario(Layout(data=2), 2), hosts).exposed == pytest.approx(NUMBERS * 4 * of_byte)
    on_gpus = forecast_layout(scenario(Layout(data=2), 2), replace(hosts, device="cuda"))
    assert on_gpus.exposed == pytest.approx(NUMBERS * 4 / 1e8 / 4)  # one block's part
    within = forecast_layout(scenario(Layout(data=2), 2), replace(hosts, ranks_per_host=2, inside=Link(1e6, 0.0)))
    assert within.exposed == pytest.approx(NUMBERS * 4 / 1e6)


def test_tensor_ranks_on_cpus_share_products_alone() -> None:
    """Of a step of one rank 60% are products, which two share, and of the rest what is kept for norms is on both."""
    asked = load(None, ["--model.layers=2", "--model.width=64", "--train.device=cpu"], PRESETS)
    speed = rank_speed(asked, 257, None, None, 1000.0)
    assert speed is not None
    one = speed.product_flops, speed.memory_bandwidth
    per_token = flops_per_token(asked.model, 257)
    assert per_token / one[0] == pytest.approx(0.6e-3)
    assert moved_bytes_per_token(asked.model, "fp32") / one[1] == pytest.approx(0.4e-3)
    cluster = replace(CLUSTER, flops=one[0], memory_bandwidth=one[1], inside=Link(math.inf, 0.0), optimizer_seconds=0.0)

    def seconds(tensor: int) -> float:
        one_sequence = LayoutScenario(asked.model, 257, Layout(tensor=tensor), 1, 1, "fp32")
        return forecast_layout(one_sequence, cluster).seconds / asked.model.context_length

    assert seconds(1) == pytest.approx(1e-3, rel=1e-6)
    assert 0.5e-3 < seconds(2) < 0.3e-3 + 0.4e-3


def test_tensor_ranks_on_cpus_sum_in_float32() -> None:
    step = forecast_layout(scenario(Layout(tensor=2), 1), replace(CLUSTER, device="cpu"))
    assert step.tensor == pytest.approx((4 * 4 + 2) * 4 * 32 * 64 / 1e9)


def test_tcp_carries_more_of_a_link_than_nccl() -> None:
    def between(device: str) -> float:
        asked = load(None, [f"--train.device={device}"], PRESETS)
        speed = rank_speed(asked, 257, None, None, 1000.0)
        return forecast_cluster(None, speed, asked, ForecastOptions("2", 1, link="8gbit")).between.bytes_per_second

    assert between("cpu") == pytest.approx(1e9 * 1448 / 1538)
    assert between("cuda") == pytest.approx(0.8e9)


def test_what_zero_exchanges() -> None:
    """On a link so slow that passes hide next to nothing, and on one so fast that one block's part is left."""
    slow = replace(CLUSTER, flops=1e15, inside=Link(1e3, 0.0))
    part = NUMBERS * 3 / 4 / 1e3
    exposed = {
        zero: forecast_layout(scenario(Layout(zero, shard=4), 8), slow).exposed for zero in (1, 2, 3)
    }  # of 2 micro-batches
    assert exposed[1] == pytest.approx((4 + 2) * part, rel=1e-3)  # gradients to their owners, weights from them
    assert exposed[2] == pytest.approx((2 * 4 + 2) * part, rel=1e-3)
    assert exposed[3] == pytest.approx(2 * (4 + 2 * 2) * part, rel=1e-3)
    data = forecast_layout(scenario(Layout(data=4), 8), slow).exposed
    assert data == pytest.approx(2 * 4 * part, rel=1e-3)
    both = forecast_layout(scenario(Layout(1, data=2, shard=2), 8), slow).exposed
    halves = NUMBERS / 2 / 1e3
    assert both == pytest.approx(4 * halves + 2 * 4 * halves / 2 + 2 * halves, rel=1e-3)
    fp32 = forecast_layout(scenario(Layout(1, shard=4), 8, precision="fp32", gradient_bytes=2.0), slow).exposed
    assert fp32 == pytest.approx((2 + 4) * part, rel=1e-3)
    hidden = forecast_layout(scenario(Layout(3, shard=4), 4), replace(CLUSTER, inside=Link(1e12, 0.0))).exposed
    assert hidden == pytest.approx((2 + 4 + 2) * NUMBERS * 3 / 4 / 4 / 1e12)


# ---- how fast a rank is


def config(*words: str) -> Config:
    return load(None, ["--model.preset=llama-8b", "--train.precision=bf16", *words], PRESETS)


def test_a_rank_attains_the_utilisation_that_is_given() -> None:
    speed = rank_speed(config(), 128256, "h100", 0.4, None)
    assert speed is not None
    cluster = Cluster(speed.product_flops, speed.memory_bandwidth, 0.0, 8, Link(1, 0), Link(1, 0))
    alone = LayoutScenario(config().model, 128256, Layout(), 1, 1)
    assert utilisation(alone, forecast_layout(alone, cluster).seconds, 989e12) == pytest.approx(0.4)
    assert speed.optimizer_seconds == pytest.approx(28 / 3350e9)
    measured = rank_speed(config(), 128256, None, None, 1000.0)
    assert measured is not None
    assert measured.product_flops == measured.overall_flops == 1000 * flops_per_token(config().model, 128256)
    both = rank_speed(config(), 128256, "h100", None, 0.4 * 989e12 / flops_per_token(config().model, 128256))
    assert both is not None and both.product_flops == pytest.approx(speed.product_flops)
    assert rank_speed(config(), 128256, None, None, None) is None


@pytest.mark.parametrize(
    ("device", "mfu", "tokens", "words", "sentence"),
    [
        (None, 0.4, None, [], "give --device, too"),
        ("h100", 1.4, None, [], "at most 1"),
        ("h100", -0.4, None, [], "--mfu -0.4: give a number above 0"),
        ("h100", 0.4, 100.0, [], "give one of them"),
        ("h100", None, None, [], "give --mfu"),
        ("h999", 0.4, None, [], "--device h999 is not known \\(known: a10, a100, "),
        ("t4", 0.4, None, [], "has no products in bf16"),
        ("h100", 0.95, None, [], "its memory allows 8"),
        ("h100", 0.4, None, ["--model.preset=tiny"], "its memory allows 1"),
    ],
)
def test_what_a_rank_cannot_be(
    device: str | None, mfu: float | None, tokens: float | None, words: list[str], sentence: str
) -> None:
    with pytest.raises(HvdlmError, match=sentence):
        rank_speed(config(*words), 257, device, mfu, tokens)


def test_every_device_has_a_name_of_its_own() -> None:
    assert len({device.option for device in DEVICES}) == len(DEVICES)
    assert device_named("H100").memory == 80
    assert device_named("a100-40gb").memory_bandwidth == 1555


@pytest.mark.parametrize(
    ("chip", "memory"),
    [
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100-PCIE-40GB", 40),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A100 80GB PCIe", 80),
        ("NVIDIA H100 80GB HBM3", 80),
        ("NVIDIA H200", 141),
        ("Tesla V100-SXM2-16GB", 16),
        ("Tesla V100-SXM2-32GB", 32),
    ],
)
def test_memory_by_what_cuda_calls_a_chip(chip: str, memory: int) -> None:
    device = device_of_chip(chip)
    assert device is not None and device.memory == memory


# ---- which layout


def test_layouts_of_eight_ranks() -> None:
    small = load(None, ["--model.layers=2", "--model.heads=4", "--model.kv_heads=2"], PRESETS)
    found = list(layouts(small, 8, 4))
    assert len(found) == len(set(found))
    assert all(each.ranks == 8 and each.tensor <= 2 and each.pipeline <= 2 for each in found)
    # of 8, 4, 4 and 2 ranks that tensor and pipeline leave: 3, 2, 2 and 1 ways to shard, and none; at 3 stages of ZeRO,
    # or in a pipeline 2
    assert len(found) == 3 * (3 + 2) + 2 * (2 + 1) + 4


def test_the_fastest_layout_that_fits() -> None:
    asked = config("--model.preset=llama-70b")
    cluster = Cluster(4e14, 3.35e12, 28 / 3.35e12, 8, Link(3.6e11, 3e-6), Link(3.2e11, 1e-5))
    found = search(asked, 128256, 64, 128, cluster, 72 * 2**30)
    assert all(each.memory.total <= 72 * 2**30 and each.scenario.layout.ranks == 64 for each in found)
    assert found == sorted(found, key=lambda each: each.step.seconds)
    roomy = search(asked, 128256, 64, 128, cluster, 1e15)
    assert roomy[0].step.seconds < found[0].step.seconds  # without recomputation
    words = found[0].settings.split()
    again = load(None, ["--model.preset=llama-70b", "--train.precision=bf16", *words], PRESETS)
    assert choice(again, 128256, found[0].scenario.layout, 128, cluster) == found[0]
    with pytest.raises(HvdlmError, match=r"no layout of 8 ranks fits into 72 GiB: .* needs the least, "):
        search(asked, 128256, 8, 128, cluster, 72 * 2**30)
    with pytest.raises(HvdlmError, match="128 sequences cannot be divided among 256 groups"):
        choice(asked, 128256, Layout(3, shard=256), 128, cluster)


# ---- published runs


def test_published_shapes_are_those_that_were_measured() -> None:
    """NumParams of llm-foundry's tables; the sizes that the others name, in 10^9."""
    counts = {run.name: parameter_count(run.scenario.model, run.scenario.vocab_size) for run in RUNS}
    assert counts["MPT 7B"] == 6_658_859_008
    assert counts["MPT 13B"] == 12_853_954_560
    assert counts["MPT 30B"] == 29_975_214_080
    assert counts["MPT 70B"] == 64_862_437_376
    table = {"1.7B": 1.7, "3.6B": 3.6, "7.5B": 7.5, "18B": 18.4, "39B": 39.1, "76B": 76.1, "145B": 145.6}
    table |= {"310B": 310.1, "530B": 529.6, "1T": 1008.0}
    for name, billions in table.items():
        assert counts[f"GPT {name}"] / 1e9 == pytest.approx(billions, abs=0.06), name
    assert counts["Llama 3 405B"] / 1e9 == pytest.approx(405.9, rel=1e-3)
    assert counts["Llama 2 13B"] / 1e9 == pytest.approx(13.016, rel=1e-3)


def test_published_utilisations_follow_from_the_speeds() -> None:
    """As torchtitan and llm-foundry print them; the latter's arithmetic counts no vocabulary apart."""
    found = {(run.source.name, run.name, run.scenario.layout.ranks): run for run in RUNS}
    for source, name, ranks, published in (
        ("llm-foundry, H100", "MPT 70B", 64, 0.4257),
        ("llm-foundry, A100", "MPT 7B", 8, 0.6423),
    ):
        run = found[source, name, ranks]
        peak = device_named(run.source.device).peak_flops("bf16")
        assert peak is not None
        count, model = parameter_count(run.scenario.model, 50368), run.scenario.model
        flops = 6 * count + 12 * model.layers * model.width * model.context_length
        assert flops * run.tokens_per_second / peak == pytest.approx(published, rel=0.01)


def test_residuals_of_published_runs() -> None:
    found = residuals()
    assert len(found) == len(RUNS)
    assert sum(each.is_fitted for each in found) == len({run.source for run in RUNS})
    assert all(abs(each.error) < 1e-6 for each in found if each.is_fitted)
    others = [each for each in found if not each.is_fitted]
    assert len(others) >= 3
    logs = [math.log(each.predicted / each.run.tokens_per_second) for each in others]
    assert spread() == pytest.approx(math.sqrt(sum(each**2 for each in logs) / len(logs)))
    assert spread() < 0.15  # what the documents say is 11%
    step = forecast_layout(others[0].run.scenario, cluster_of(others[0].run.source, others[0].share))
    tokens = others[0].run.scenario.tokens / step.seconds / others[0].run.scenario.layout.ranks
    assert others[0].predicted == pytest.approx(tokens)


def test_the_page_of_published_runs_has_a_row_for_each() -> None:
    text = page_of_published_runs.page(residuals())
    rows = [line for line in text.splitlines() if re.match(r"\| (MPT|Llama|GPT) ", line)]
    assert len(rows) == len(RUNS)
    assert all(re.search(r"\| (fitted|[+-]\d+\.\d%) \|$", row) for row in rows)
    committed = Path(page_of_published_runs.__file__).parent / "results" / "published_runs.md"
    assert committed.read_text(encoding="utf-8") == text, "run python benchmarks/published_runs.py"


# ---- the command

OPTIONS = ForecastOptions(
    ranks="256",
    link="3200gbit",
    preset="llama-70b",
    device="h100",
    mfu=0.4,
    overrides=["--train.precision=bf16", "--train.global_batch_size=512", "--train.micro_batch_size=1"],
)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(re.sub("[┃│]", " ", capsys.readouterr().out).split())


def test_the_command_forecasts_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*OPTIONS.overrides, "--parallel.shard=3", "--parallel.tensor=8"]
    predict(None, replace(OPTIONS, ranks="256,512", overrides=words))
    text = said(capsys)
    assert "ZeRO 3 x 32" in text and "ZeRO 3 x 64" in text and "of 80" in text
    assert "11%" in text and "published runs" in text
    assert "One rank computes 395.6 of its 989 TFLOP/s in bf16." in text
    with pytest.raises(HvdlmError, match=r"12 ranks cannot be arranged by parallel\.tensor = 8"):
        predict(None, replace(OPTIONS, ranks="12", overrides=words))


def test_a_batch_per_rank_grows_with_the_groups_that_read_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train.precision=bf16", "--parallel.shard=3", "--parallel.tensor=8"]
    speeds = []
    for ranks in ("64", "128"):
        predict(None, replace(OPTIONS, ranks=ranks, batch_size_per_rank=4, overrides=words))
        speeds.append(re.search(r"\d ([\d,]+) [\d,]+ to", said(capsys)))
    first, second = (float(each[1].replace(",", "")) for each in speeds if each)
    assert second == pytest.approx(2 * first, rel=0.05)


def test_the_command_forecasts_by_one_rank_s_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """8 CPU ranks of 2 hosts, of 1,000 tokens/s each; links so fast that almost nothing is waited for."""
    words = ["--train.global_batch_size=64", "--train.device=cpu", "--parallel.shard=1"]
    predict(
        None,
        ForecastOptions("8", 4, "400gbit", "400gbit", tokens_per_second=1000.0, overrides=words),
    )
    text = said(capsys)
    found = re.search(r"ZeRO 1 x 8 8 ([\d,]+) ", text)
    assert found and float(found[1].replace(",", "")) == pytest.approx(8000, rel=0.01)
    assert re.search(r"One rank computes 0.00\d+ TFLOP/s in fp32", text)


def test_the_command_searches(capsys: pytest.CaptureFixture[str]) -> None:
    predict(None, replace(OPTIONS, search=True))
    text = said(capsys)
    assert re.search(r"The fastest: --parallel.shard 3 .*--train.micro_batch_size \d+", text)
    assert "too much" not in text


def test_measured_links_and_ranks_of_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, point in enumerate([make_point(ranks, rate) for ranks in (1, 2, 4) for rate in (1e8, 1e9)]):
        write_record(tmp_path / f"{index}.point.json", point)
    model = fit([make_point(ranks, rate) for ranks in (1, 2, 4) for rate in (1e8, 1e9)])
    write_record(tmp_path / "fit.json", model)
    asked = ForecastOptions(ranks="4", overrides=["--parallel.shard=1", "--train.global_batch_size=16"])
    predict(tmp_path / "fit.json", asked)
    text = said(capsys)
    assert "ZeRO 1 x 4" in text and "published" not in text
    predict(
        tmp_path / "fit.json",
        ForecastOptions(
            ranks="1..4",
            preset="llama-8b",
            device="h100",
            mfu=0.4,
            overrides=["--train.precision=bf16"],
            batch_size_per_rank=1,
        ),
    )
    text = said(capsys)
    assert "codec none" in text and "codec fp16" not in text
    seconds = flops_per_token(preset("llama-8b"), 128256) * 8192 / (0.4 * 989e12)
    optimizer = 8_030_261_248 * 28 / 3350e9
    step = re.search(r" 1 ([\d,]+) [\d,]+ to [\d,]+ 100.0% ([\d,.]+) ", text)
    assert step and float(step[2].replace(",", "")) == pytest.approx(1e3 * (seconds + optimizer), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": None, "mfu": None}, "nothing says how fast a rank is: give --device and --mfu"),
        (
            {"device": None, "mfu": None, "tokens_per_second": 100.0},
            "what joins the ranks of a host: give --intra-node",
        ),
        ({"link": None}, "what joins the hosts: give --link"),
        ({"codecs": ["int4"]}, "with codec none, fp16, bf16, not int4"),
        ({"codecs": ["none", "fp16"]}, "give --codec once"),
        ({"ranks_per_host": -1}, "--per-node -1"),
        ({"ranks": "2048"}, "512 sequences cannot be divided among 2,048 groups"),
        ({"overrides": ["--local_steps.every=4"]}, "give a file of hvdlm fit"),
        ({"overrides": ["--optimizer.algorithm=muon"]}, "'muon' has no forecast"),
        ({"overrides": ["--server.ranks=2"]}, "server.ranks is forecast from measured ranks"),
        ({"search": True, "ranks": "8,16"}, "of one number of ranks"),
        ({"search": True, "batch_size_per_rank": 1}, "one global batch"),
        ({"search": True, "overrides": ["--parallel.tensor=2"]}, "leave its settings out"),
        (
            {"search": True, "device": None, "mfu": None, "tokens_per_second": 9.0, "inside_link": "1gbit"},
            "give --device",
        ),
    ],
)
def test_what_cannot_be_forecast(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(HvdlmError, match=sentence):
        predict(None, replace(OPTIONS, **changes))  # type: ignore[arg-type]
