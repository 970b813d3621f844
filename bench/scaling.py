"""Scaling on paper: what a training step exchanges between ranks, and from how many ranks on that shows.

    python bench/scaling.py    writes docs/scaling.png and the tables of docs/scaling.md

Bytes are counted from the network and the training step; `tests/test_scaling.py` compares them with what
torch.distributed is given. Times of exchanges are those of NCCL's own model of a ring; nothing overlaps, as
in `mgt_fast.train.step`. The time of a rank's own crystals is measured where `bench/results` has a record of
the device. As long as it has none of a GPU, an H100's is predicted, and marked so: every operation on its
roof (`costs`, `roofline`), which no program reaches, and a fifth of that, an assumption.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import costs
import matplotlib
import numpy as np
from record import RESULTS
from roofline import DATASHEET, EDGES_PER_ATOM, EDGES_PER_CRYSTAL

from mgt_fast import MGT, MGTConfig
from mgt_fast.kernels.statistics import norms_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED = MGTConfig(task="pretrain")
VOTES = 3  # numbers by which ranks decide in a step: an error, a stop, a save
EXCHANGED = ("gradients", "statistics", "embeddings")
CRYSTALS = (16, 128, 1024)  # of a rank in a step
SHOWS = (0.05, 0.5)  # parts of a step
PUBLISHED_BATCH = 128
DATASET, EPOCHS = 10**8, 200
ASSUMED_SHARE = 0.2  # of the roofs
PROGRAMS = ("triton-bf16", "torch-float32")  # whose record is taken, the first there is
GPU_FLOAT32 = 67e12  # H100 SXM, NVIDIA's data sheet


@dataclass(frozen=True)
class Exchange:
    """What a step exchanges `times` times: so many bytes of every rank."""

    name: str
    collective: str
    num_bytes: int
    times: int = 1


def exchanges(config: MGTConfig, batch_size: int, statistics: str = "global") -> list[Exchange]:
    """Return what ranks exchange in a step over a global batch that is not worked on in chunks."""
    numbers, norms = _counts(config)
    compares = config.task == "pretrain" and config.views == "both"
    numbers += VOTES + (4 if compares else 2)  # the loss and its parts
    if statistics == "local":  # running means and variances
        numbers += sum(2 * width * times for width, times in norms)
    found = [Exchange("gradients", "all_reduce", 4 * numbers)]
    if compares:  # themselves, and their gradient
        found.append(Exchange("embeddings", "all_reduce", 4 * 2 * batch_size * config.channels, 2))
    if statistics == "global":
        for width, times in norms:
            found.append(Exchange("statistics", "all_gather", 8 * (2 * width + 1), times))
            found.append(Exchange("statistics", "all_gather", 8 * 2 * width, times))
    return found


@lru_cache
def _counts(config: MGTConfig) -> tuple[int, list[tuple[int, int]]]:
    """Return how many numbers the parameters are, and how many norms there are of each width."""
    model = MGT(config)
    widths = Counter(norm.num_features for norm in norms_of(model))
    return sum(parameter.numel() for parameter in model.parameters()), sorted(widths.items())


@dataclass(frozen=True)
class Protocol:
    """A way in which NCCL moves data round a ring: seconds to begin, a hop by NVLink and by network."""

    begin: float
    near: float
    far: float
    bandwidth: float


PROTOCOLS = (Protocol(3.6e-6, 0.47e-6, 2.7e-6, 0.25), Protocol(8.4e-6, 3.4e-6, 9.6e-6, 1.0))
"""For low latency and for full bandwidth: NCCL, src/graph/tuning.cc, commit 01afd20a."""

NVLINK = 450e9
"""Bytes a second in each direction: 18 links of NVLink 4, 900 GB/s in both (NVIDIA H100 data sheet)."""

TCP_HOP = 10e-6
"""Seconds from process to process at best (Larsen et al., SBAC-PAD 2007)."""


@dataclass(frozen=True)
class Network:
    """How machines are connected.

    Attributes:
        name: of the network.
        bandwidth: bytes a second that leave a machine.
        delay: seconds a hop takes beyond NCCL's.
        ranks: of a machine.
        shown: numbers of ranks in the table of a step's parts.
        most_ranks: that can be connected.
    """

    name: str
    bandwidth: float
    delay: float = 0.0
    ranks: int = 8
    shown: tuple[int, ...] = (64, 512)
    most_ranks: int = 4096


NETWORKS = (
    Network("NVLink 4, one machine", NVLINK, shown=(8,), most_ranks=8),
    Network("8 × InfiniBand NDR a machine", 8 * 50e9),
    Network("1 × InfiniBand NDR a machine", 50e9),
    Network("100 GbE", 12.5e9, TCP_HOP),
)
"""Machines of eight GPUs; NDR: 400 Gb/s a port, eight of which a DGX H100 has (NVIDIA data sheets)."""

CPU_NETWORKS = (Network("100 GbE, one rank a machine", 12.5e9, TCP_HOP, ranks=1, shown=(8, 64)),)


def exchange_seconds(exchange: Exchange, num_ranks: int, network: Network) -> float:
    """Return how long an exchange takes, all its times, in a ring through all ranks."""
    if num_ranks == 1:
        return 0.0
    rounds = 2 if exchange.collective == "all_reduce" else 1
    machines = -(-num_ranks // network.ranks)
    near, far = rounds * (num_ranks - machines), rounds * (machines - 1)
    sent = exchange.num_bytes * (num_ranks - 1) * (2 / num_ranks if rounds == 2 else 1)
    bandwidth = NVLINK if machines == 1 else min(NVLINK, network.bandwidth)
    times = (
        way.begin + near * way.near + far * (way.far + network.delay) + sent / (bandwidth * way.bandwidth)
        for way in PROTOCOLS
    )
    return exchange.times * min(times)


@dataclass(frozen=True)
class Device:
    """A device, and how fast it trains at the published sizes.

    Attributes:
        name: of the device, with what is measured or predicted.
        measured: whether the times are.
        seconds: of a step over a number of edges.
        float32: FLOP/s of products in float32.
        networks: that connect such devices.
    """

    name: str
    measured: bool
    seconds: Callable[[float], float]
    float32: float
    networks: tuple[Network, ...]


def measured_device(record: dict) -> Device | None:
    """Return the device of a record; None if it holds no training step at the published sizes."""
    group = f"training step, C = {PUBLISHED.channels},"
    steps = [entry for entry in record.values() if entry.get("group", "").startswith(group)]
    for program in PROGRAMS:
        own = sorted((entry["edges"], entry["us_per_edge"]) for entry in steps if entry["rival"] == program)
        if own:
            ceilings = record["ceilings"]
            gpu = "cuda" in steps[0]["versions"]
            return Device(
                f"{ceilings['device']}, {program}, measured",
                True,
                _interpolated(own),
                ceilings["float32"],
                NETWORKS if gpu else CPU_NETWORKS,
            )
    return None


def _interpolated(measured: list[tuple[float, float]]) -> Callable[[float], float]:
    """Return the seconds of a step over so many edges from (edges, µs an edge), which end where these end."""
    edges, us_per_edge = np.array(measured).T
    return lambda n: n * 1e-6 * float(np.interp(np.log(n), np.log(edges), us_per_edge))


def predicted_device(share: float) -> Device:
    """Return an H100 that reaches so large a share of its roofs, in bfloat16."""
    seconds = roof_seconds_per_edge() / share
    name = f"H100, bf16, predicted: {'its roofs' if share == 1 else f'{share:.0%} of its roofs'}"
    return Device(name, False, lambda n: n * seconds, GPU_FLOAT32, NETWORKS)


def roof_seconds_per_edge(num_edges: int = 100_000) -> float:
    """Return the least time of a training step at an H100's data-sheet rates, for each edge."""
    sizes = costs.Sizes(num_edges // EDGES_PER_ATOM, num_edges, num_edges // EDGES_PER_CRYSTAL)
    blocks = sizes.num_blocks
    parts = [
        (blocks, costs.edge_attention(sizes)),
        (2 * blocks, costs.node_attention(sizes)),
        (blocks, costs.tensor_product_1(sizes)),
        (blocks, costs.tensor_product_2(sizes)),
        (blocks, costs.residual_norm(sizes, num_edges)),
        (1, costs.rbf_embedding(sizes, 5 * num_edges)),
    ]
    least, flops = 0.0, 0.0
    for times, part in parts:
        for cost in (part.forward, part.backward):
            least += times * cost.floor(DATASHEET["bf16"], DATASHEET["copy"])
        flops += times * part.flops
    others = 3 * (costs.model_flops(sizes) - flops) / DATASHEET["bf16"]
    return (least + others) / num_edges


def devices(folder: Path = RESULTS) -> list[Device]:
    """Return the measured devices, and if none is a GPU the predicted ones."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [measured_device(record) for record in records if "ceilings" in record]
    found = [device for device in found if device is not None]
    if not any(device.networks is NETWORKS for device in found):
        found += [predicted_device(share) for share in (1.0, ASSUMED_SHARE)]
    return found


def step_parts(
    device: Device, network: Network, num_ranks: int, crystals: int, statistics: str = "global"
) -> dict[str, float]:
    """Return the seconds of a pretraining step's parts, with so many crystals a rank."""
    rows = 2 * num_ranks * crystals
    parts = {
        "own crystals": device.seconds(crystals * EDGES_PER_CRYSTAL),
        # Three products of all similarities, in float32, divided among the ranks.
        "contrast": 3 * 2 * rows**2 * PUBLISHED.channels / num_ranks / device.float32,
    }
    for exchange in exchanges(PUBLISHED, num_ranks * crystals, statistics):
        seconds = exchange_seconds(exchange, num_ranks, network)
        parts[exchange.name] = parts.get(exchange.name, 0.0) + seconds
    return parts


def communication(parts: dict[str, float]) -> float:
    """Return the part of a step in which ranks exchange."""
    return sum(parts.get(name, 0.0) for name in EXCHANGED) / sum(parts.values())


def first_ranks(
    network: Network, parts_of: Callable[[int], dict[str, float]], holds: Callable[[dict], bool]
) -> str:
    """Return the least number of ranks at which something holds of a step's parts; "–" for none."""
    ranks = range(2, network.most_ranks + 1)
    return str(next((n for n in ranks if holds(parts_of(n))), "–"))


def exchange_table(batch_size: int = PUBLISHED_BATCH) -> str:
    """Markdown: what a step of the published pretraining exchanges."""
    lines = ["| exchange | collective | times | bytes of a rank, each | together |", "|---|---|--:|--:|--:|"]
    for e in sorted(exchanges(PUBLISHED, batch_size), key=lambda e: -e.num_bytes):
        lines.append(
            f"| {e.name} | {e.collective.replace('_', '-')} | {e.times} | {e.num_bytes:,} "
            f"| {e.times * e.num_bytes:,} |"
        )
    return "\n".join(lines)


def parts_table(shown: Sequence[Device], crystals: int = 128) -> str:
    """Markdown: where a step's time goes."""
    names = ("own crystals", "contrast", *EXCHANGED)
    lines = [
        f"| device | network | ranks | {' | '.join(names)} | communication |",
        "|---|---|--:|" + "--:|" * (len(names) + 1),
    ]
    for device in shown:
        for network in device.networks:
            for num_ranks in network.shown:
                parts = step_parts(device, network, num_ranks, crystals)
                cells = " | ".join(_figure(1e3 * parts[name]) for name in names)
                lines.append(
                    f"| {device.name} | {network.name} | {num_ranks} | {cells} | {communication(parts):.0%} |"
                )
    return "\n".join(lines)


def ranks_table(shown: Sequence[Device]) -> str:
    """Markdown: the ranks at which communication takes 5 % and 50 % of a step."""
    head = " | ".join(f"{crystals} crystals a rank" for crystals in CRYSTALS)
    lines = [f"| device | network | statistics | {head} |", "|---|---|---|" + "--:|" * len(CRYSTALS)]
    for device in shown:
        for network in device.networks:
            for statistics in ("global", "local"):
                cells = []
                for crystals in CRYSTALS:
                    parts_of = partial(step_parts, device, network, crystals=crystals, statistics=statistics)
                    found = (
                        first_ranks(network, parts_of, lambda parts, part=part: communication(parts) >= part)
                        for part in SHOWS
                    )
                    cells.append(" / ".join(found))
                lines.append(f"| {device.name} | {network.name} | {statistics} | {' | '.join(cells)} |")
    return "\n".join(lines)


def limits_table(shown: Sequence[Device]) -> str:
    """Markdown: the ranks at which another part of a step takes as long as a rank's own crystals."""
    names = ("contrast", *EXCHANGED)
    lines = [f"| device | network | {' | '.join(names)} |", "|---|---|" + "--:|" * len(names)]
    for device in shown:
        for network in device.networks:
            cells = []
            for name in names:
                found = (
                    first_ranks(
                        network,
                        partial(step_parts, device, network, crystals=crystals),
                        lambda parts, name=name: parts[name] >= parts["own crystals"],
                    )
                    for crystals in CRYSTALS
                )
                cells.append(" / ".join(found))
            lines.append(f"| {device.name} | {network.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def published_table(shown: Sequence[Device]) -> str:
    """Markdown: what more ranks gain at the published batch size."""
    lines = [
        "| device | network | ranks | step, ms | communication | times as fast as one |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for device in shown:
        network = device.networks[0]
        alone = sum(step_parts(device, network, 1, PUBLISHED_BATCH).values())
        for num_ranks in (1, 2, 4, 8):
            parts = step_parts(device, network, num_ranks, PUBLISHED_BATCH // num_ranks)
            step = sum(parts.values())
            lines.append(
                f"| {device.name} | {network.name} | {num_ranks} | {_figure(1e3 * step)} "
                f"| {communication(parts):.0%} | {alone / step:.1f} |"
            )
    return "\n".join(lines)


def cost_table(shown: Sequence[Device], crystals: int = 128, num_ranks: int = 64) -> str:
    """Markdown: device-hours of 10^8 crystals, on one device and on many."""
    lines = [
        f"| device | µs an edge | crystals/s | device-hours, one epoch | {EPOCHS} epochs "
        f"| one epoch on {num_ranks} ranks |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for device in shown:
        parts = step_parts(device, device.networks[:2][-1], num_ranks, crystals)
        seconds = parts["own crystals"] / crystals
        hours = DATASET * seconds / 3600
        together = hours * sum(parts.values()) / parts["own crystals"]
        cells = (1e6 * seconds / EDGES_PER_CRYSTAL, 1 / seconds, hours, EPOCHS * hours, together)
        lines.append(f"| {device.name} | {' | '.join(map(_figure, cells))} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Three digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def picture(shown: Sequence[Device], path: Path) -> None:
    """Draw communication's part of a step over the number of ranks: devices down, networks across."""
    shown = [device for device in shown if device.networks is NETWORKS]
    networks = (NETWORKS[1], NETWORKS[3])
    figure, panels = plt.subplots(
        len(shown), len(networks), figsize=(10, 3.6 * len(shown)), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    ranks = 2 ** np.arange(1, 11)
    for device, row in zip(shown, panels, strict=True):
        for network, axes in zip(networks, row, strict=True):
            for place, crystals in enumerate(CRYSTALS):
                for statistics, style in (("global", "-"), ("local", "--")):
                    parts = [step_parts(device, network, int(n), crystals, statistics) for n in ranks]
                    label = f"{crystals} crystals a rank, {statistics}"
                    shares = [100 * communication(one) for one in parts]
                    axes.plot(ranks, shares, style, color=f"C{place}", label=label)
            for part in SHOWS:
                axes.axhline(100 * part, color="grey", linewidth=0.8)
            axes.set_title(f"{device.name}\n{network.name} (NVLink 4 within)", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
    for axes in panels[-1]:
        axes.set_xlabel("ranks, eight a machine")
    for axes in panels[:, 0]:
        axes.set(ylabel="communication, % of a step", ylim=(0, 100))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    made = "Measured steps" if all(device.measured for device in shown) else "Predicted, not measured"
    figure.suptitle(f"{made}: pretraining at the published sizes, exchanges modelled")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fill(text: str, tables: dict[str, str]) -> str:
    """Put each table between its marks, `<!-- name -->` and `<!-- end -->`, whatever stood there.

    Raises:
        ValueError: if the text lacks the marks of a table.
    """
    for name, table in tables.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marks.search(text):
            raise ValueError(f"the page has no place <!-- {name} --> ... <!-- end --> for a table")
        text = marks.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the devices' records")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of scaling.md")
    arguments = parser.parse_args(argv)
    shown = devices(arguments.results)
    tables = {
        "exchanges": exchange_table(),
        "parts": parts_table(shown),
        "ranks": ranks_table(shown),
        "limits": limits_table(shown),
        "published": published_table(shown),
        "cost": cost_table(shown),
    }
    page = arguments.docs / "scaling.md"
    page.write_text(fill(page.read_text(), tables))
    picture(shown, arguments.docs / "scaling.png")
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
