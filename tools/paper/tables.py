"""The tables of docs/paper.md: what tools/paper/reproduce.py measured beside what the paper printed.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `filled` writes them all anew.
The paper's figures are those of arXiv 2605.21426: CIFAR-10, top-1 in percent, 20 batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tools.paper.grid import (
    ABLATION_SPARSITY,
    BATCH,
    GAIN_SAMPLES,
    HELD_OUT,
    MAIN_BATCHES,
    METHODS,
    PAPER_METHODS,
    RELIABILITY_POWERS,
    reliable,
)

Data = dict[str, Any]

COLUMNS = ("0.7", "0.9", "2:4")
TITLES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "densenet121": "DenseNet-121", "vgg16": "VGG-16-BN"}
PAPER_DENSE = {"resnet18": 92.77, "resnet50": 93.33, "densenet121": 92.75, "vgg16": 87.35}
PAPER_MAIN: dict[str, dict[str, tuple[float, float, float]]] = {
    "resnet18": {
        "none": (37.73, 8.19, 15.68),
        "bn": (88.53, 53.70, 78.50),
        "layerwise": (88.59, 58.77, 76.17),
        "asr": (88.88, 63.56, 76.64),
    },
    "resnet50": {
        "none": (10.87, 10.00, 13.55),
        "bn": (88.58, 28.04, 82.28),
        "layerwise": (88.69, 41.01, 78.18),
        "asr": (89.25, 55.59, 86.74),
    },
    "densenet121": {
        "none": (40.74, 9.29, 12.57),
        "bn": (86.28, 16.09, 79.91),
        "layerwise": (85.00, 14.21, 79.68),
        "asr": (85.68, 17.59, 80.58),
    },
    "vgg16": {
        "none": (52.15, 11.90, 14.72),
        "bn": (83.44, 38.93, 63.29),
        "layerwise": (81.27, 26.49, 50.43),
        "asr": (81.72, 29.62, 56.70),
    },
}
PAPER_ABLATION = {
    "bn:20": 29.11,
    "layerwise:20": 39.42,
    "raw:20": 29.30,
    "asr:20,fixed,no shift": 45.24,
    "asr:20,no shift": 52.26,
    "asr:20,mean": 53.95,
    "asr:20": 55.59,
}
OTHER_ABLATION = ("layerwise:20,no shift", "raw:20,no shift", "asr:20,fixed", "asr:20,mean,no shift")
SEVERITY_GAINS = (
    (f"asr:{MAIN_BATCHES},scaled", f"bn:{MAIN_BATCHES},scaled"),
    ("paired", "bn:exact"),
    ("refit", "bn:exact"),
)
MISSING = "–"


def filled(page: str, data: Data) -> str:
    """The page with every table made from the data.

    Raises:
        ValueError: When the page names a table that there is not, or the other way round.
    """
    names = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"the page has the tables {sorted(names)}, expected are {sorted(TABLES)}")

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]](data)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def value(data: Data, net: str, sparsity: str, name: str, key: str = "top1") -> float | None:
    """One measured figure, top-1 in percent; None where the cell was not computed."""
    cell = data["cells"].get(net, {}).get(sparsity, {}).get(name)
    if cell is None:
        return None
    return float(100 * cell[key] if key == "top1" else cell[key])


def difference(data: Data, net: str, sparsity: str, better: str, worse: str) -> float | None:
    """By how many points one cell is above another."""
    first, second = value(data, net, sparsity, better), value(data, net, sparsity, worse)
    return None if first is None or second is None else first - second


def text(number: float | None, form: str = ".1f") -> str:
    return MISSING if number is None else format(number, form)


def share(sparsity: str) -> str:
    """A sparsity as a reader knows it, with the scope where it is not global."""
    if ":" in sparsity:
        return sparsity
    number, *scope = sparsity.split()
    return ", ".join([f"{100 * float(number):g}%", *(f"`{name}`" for name in scope)])


def title(net: str) -> str:
    return TITLES.get(net, net)


def at(method: str) -> str:
    """The cell of the main table for a method."""
    return f"{method}:{MAIN_BATCHES}" if method in PAPER_METHODS else method


def on_scaled(method: str) -> str:
    """The cell of a method's moving average on the scaled nets."""
    return f"{at(method)},scaled"


def label(name: str) -> str:
    """A cell's name as a reader knows it."""
    method, *others = re.split("[:,]", name)
    end = "".join(f", b = {other}" if other.isdigit() else f", {other}" for other in others)
    return f"`{method}`{end}"


def sparsities(data: Data) -> list[str]:
    """All that were measured, patterns last."""
    found = {sparsity for net in data["cells"].values() for sparsity in net} - {"0"}
    return sorted(found, key=lambda sparsity: (":" in sparsity, sparsity))


def batches(data: Data) -> list[int]:
    """All numbers of batches that were measured."""
    names = {name for net in data["cells"].values() for cells in net.values() for name in cells}
    return sorted({int(found[1]) for name in names if (found := re.match(r"bn:(\d+)", name))})


def protocol(data: Data) -> str:
    """What was calibrated and scored on how many images."""
    scored, counts = data["score_images"], ", ".join(map(str, batches(data)))
    error = 100 * np.sqrt(0.25 / scored)
    body = [
        ["gains of `layerwise`, `raw`, `asr`", f"{GAIN_SAMPLES} images"],
        [
            "moving average",
            f"b = {counts} batches of {BATCH} images, momentum 0.1, after a reset",
        ],
        ["`exact`, `paired`, `refit`, `auto`", f"{data['images']:,} images, without labels"],
        ["`auto` chooses by", f"{HELD_OUT} more"],
        ["top-1", f"{scored:,} test images, standard error at most {error:.1f} points"],
    ]
    return rows(["", ""], body)


def nets(data: Data) -> str:
    """How large the nets are, how they were trained, and what they reach."""
    body = []
    for net, record in data["nets"].items():
        settings = record["settings"]
        body.append(
            [
                title(net),
                f"{settings['width']:g}",
                f"{record['parameters']:,}",
                f"{settings['epochs']}",
                f"{100 * record['top1']:.1f}",
                text(value(data, net, "0", "dense")),
                text(PAPER_DENSE.get(net), ".2f"),
                f"{record['running_variance']:.2g}",
            ]
        )
    images = f"{data['score_images']:,}"
    head = ["net", "width", "parameters", "epochs", "top-1, 10,000 images", f"of these {images}", "the paper's"]
    return rows([*head, "median running variance"], body)


def main(data: Data) -> str:
    """The paper's main table: ours, and the paper's in parentheses."""
    known = sparsities(data)
    body = []
    for net in data["nets"]:
        dense = f"{text(value(data, net, '0', 'dense'))} ({text(PAPER_DENSE.get(net), '.2f')})"
        body.append([f"**{title(net)}**, dense {dense}", *[""] * len(known)])
        for method in METHODS:
            printed = dict(zip(COLUMNS, PAPER_MAIN.get(net, {}).get(method, ()), strict=False))
            cells = []
            for sparsity in known:
                ours = text(value(data, net, sparsity, at(method)))
                cells.append(f"{ours} ({printed[sparsity]:.2f})" if sparsity in printed else ours)
            body.append([f"`{method}`", *cells])
    return rows(["", *map(share, known)], body)


def retention(data: Data) -> str:
    """What is left of the dense net's accuracy."""
    body = []
    for net in data["nets"]:
        dense = value(data, net, "0", "dense")
        assert dense is not None
        for column, sparsity in enumerate(COLUMNS):
            kept = {m: value(data, net, sparsity, at(m)) for m in METHODS}
            left = {method: 100 * number / dense for method, number in kept.items() if number is not None}
            moving = [value(data, net, sparsity, on_scaled(method)) for method in ("bn", "layerwise", "asr")]
            of_paper = [100 * number / dense for number in (kept["none"], *moving) if number is not None]
            printed = [figures[column] for figures in PAPER_MAIN.get(net, {}).values()]
            target = 100 * max(printed) / PAPER_DENSE[net] if printed else None
            best = max((left[method] for method in ("refit", "auto") if method in left), default=None)
            verdict = MISSING
            if best is not None and target is not None:
                verdict = "yes" if best > target else "**no**"
            here = max(of_paper, default=None)
            names = [text(left.get(method)) for method in ("refit", "auto")]
            body.append([title(net), share(sparsity), text(target), text(here), *names, verdict])
    head = [
        "net",
        "sparsity",
        "the paper's best",
        "the best of these here: its methods, scaled, b = 20, and `none`",
        "`refit`",
        "`auto`",
        "above the paper's best",
    ]
    return rows(head, body)


def order(data: Data) -> str:
    """Who is ahead at 20 batches, here on scaled nets and in the paper."""
    body = []
    for net in data["nets"]:
        for column, sparsity in enumerate(COLUMNS):
            printed = PAPER_MAIN.get(net)
            pairs = [("asr", "bn"), ("asr", "layerwise"), ("layerwise", "bn")]
            cells = []
            for better, worse in pairs:
                ours = difference(data, net, sparsity, on_scaled(better), on_scaled(worse))
                theirs = None if printed is None else printed[better][column] - printed[worse][column]
                cells.append(f"{text(ours, '+.1f')} ({text(theirs, '+.1f')})")
            body.append([title(net), share(sparsity), *cells])
    return rows(["net", "sparsity", "`asr` - `bn`", "`asr` - `layerwise`", "`layerwise` - `bn`"], body)


def curve(data: Data) -> str:
    """Top-1 at 90% by the number of batches."""
    counts = batches(data)
    body = []
    for net in data["nets"]:
        for method in PAPER_METHODS:
            for end in ("", ",scaled"):
                names = [f"{method}:{run}{end}" for run in (*counts, "exact")]
                figures = [text(value(data, net, "0.9", name)) for name in names]
                body.append([title(net), f"`{method}`{end.replace(',', ', ')}", *figures])
    return rows(["net, 90%", "method", *(f"b = {count}" for count in counts), "exact"], body)


def unpruned(data: Data) -> str:
    """What the re-estimation alone does to a net from which nothing was pruned."""
    counts = [f"{count}" for count in batches(data)]
    names = ["dense", *(f"bn:{count}" for count in counts), f"{at('bn')},scaled", "bn:exact"]
    body = [[title(net), *(text(value(data, net, "0", name)) for name in names)] for net in data["nets"]]
    heads = [*(f"b = {count}" for count in counts), f"b = {MAIN_BATCHES}, scaled", "exact"]
    return rows(["`bn` on the dense net", "before", *heads], body)


def scaled(data: Data) -> str:
    """The same networks with variances about 1 in front of BatchNormalization, where the moving average begins."""
    body = []
    for net in data["nets"]:
        for column, sparsity in enumerate(COLUMNS):
            cells = []
            for method in PAPER_METHODS:
                before, after = (value(data, net, sparsity, name) for name in (at(method), on_scaled(method)))
                printed = PAPER_MAIN.get(net, {}).get(method)
                theirs = "" if printed is None else f" ({printed[column]:.2f})"
                cells.append(f"{text(before)} → {text(after)}{theirs}")
            body.append([title(net), share(sparsity), *cells, text(value(data, net, sparsity, "bn:exact"))])
    heads = [*(f"`{method}`" for method in PAPER_METHODS), f"{label('bn:exact')}, not scaled"]
    return rows(["net", "sparsity", *heads], body)


def epsilon(data: Data) -> str:
    """The exact re-estimation where epsilon is larger against the variances, and where it is smaller."""
    names = [f"{method}:exact{end}" for end in ("", ",scaled") for method in PAPER_METHODS]
    body = [[title(net), *(text(value(data, net, ABLATION_SPARSITY, name)) for name in names)] for net in data["nets"]]
    return rows([share(ABLATION_SPARSITY), *map(label, names)], body)


def reliability(data: Data) -> str:
    """`paired` with powers of the correlation in its gains, between what it is compared with."""
    names = ("bn:exact", "paired", *map(reliable, RELIABILITY_POWERS), "refit")
    body = [[title(net), *(text(value(data, net, ABLATION_SPARSITY, name)) for name in names)] for net in data["nets"]]
    powers = [f"`paired`, K = {power:g}" for power in (0, *RELIABILITY_POWERS)]
    return rows([share(ABLATION_SPARSITY), label("bn:exact"), *powers, "`refit`"], body)


def gap(data: Data) -> str:
    """What the gains are worth by the number of batches."""
    names = [*(f"{count},scaled" for count in batches(data)), "exact"]
    body = []
    for net in data["nets"]:
        for s in sparsities(data):
            gaps = [difference(data, net, s, f"asr:{name}", f"bn:{name}") for name in names]
            if set(gaps) != {None}:
                body.append([title(net), share(s), *(text(number, "+.1f") for number in gaps)])
    heads = [f"b = {count}" for count in batches(data)]
    return rows(["`asr` - `bn`, scaled", "sparsity", *heads, "exact, not scaled"], body)


def severities(data: Data) -> list[tuple[float, str, str]]:
    """Severity, net and sparsity of every pruned net, the least damaged first."""
    found = []
    for net in data["nets"]:
        for sparsity in sparsities(data):
            severity = value(data, net, sparsity, "damage", "severity")
            if severity is not None:
                found.append((severity, net, sparsity))
    return sorted(found)


def severity(data: Data) -> str:
    """What pruning did to the channels, and what repairs are worth then."""
    body = []
    for number, net, sparsity in severities(data):
        gains = [difference(data, net, sparsity, *pair) for pair in SEVERITY_GAINS]
        if set(gains) == {None}:
            continue
        cells = [f"{number:.2f}"]
        cells += [text(value(data, net, sparsity, "damage", key), ".2f") for key in ("collapsed", "correlation")]
        body.append([title(net), share(sparsity), *cells, *(text(gain, "+.1f") for gain in gains)])
    heads = [f"{label(better)} - {label(worse)}" for better, worse in SEVERITY_GAINS]
    return rows(["net", "sparsity", "severity", "collapsed", "correlation", *heads], body)


def ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Ranks from 0; equal values share the mean of theirs."""
    array = np.asarray(values)
    less, equal = (array[:, None] > array).sum(axis=1), (array[:, None] == array).sum(axis=1)
    return np.asarray(less + (equal - 1) / 2)


def correlations(data: Data) -> str:
    """Spearman's rank correlation of severity with gains."""
    body = []
    for better, worse in SEVERITY_GAINS:
        pairs = [(number, difference(data, net, s, better, worse)) for number, net, s in severities(data)]
        known = [(number, gain) for number, gain in pairs if gain is not None]
        varies = len(known) > 2 and all(len(set(column)) > 1 for column in zip(*known, strict=True))
        rho = float(np.corrcoef([ranks(column) for column in zip(*known, strict=True)])[0, 1]) if varies else None
        body.append([f"{label(better)} - {label(worse)}", f"{len(known)}", text(rho, "+.2f")])
    return rows(["gain", "pruned nets", "Spearman's rho with severity"], body)


def ablation(data: Data) -> str:
    """Table 2 of the paper, which is about ResNet-50, for all nets, scaled: 90%, 20 batches."""
    body = []
    for name in (*PAPER_ABLATION, *OTHER_ABLATION):
        method, *others = name.replace(f":{MAIN_BATCHES}", "").split(",")
        prior = f", {next((o for o in others if o in ('mean', 'fixed')), 'median')} prior" if method == "asr" else ""
        shift = "" if method == "bn" else ", no bias correction" if "no shift" in others else ", bias correction"
        ours = [text(value(data, net, ABLATION_SPARSITY, f"{name},scaled")) for net in data["nets"]]
        body.append([f"`{method}`{prior}{shift}", *ours, text(PAPER_ABLATION.get(name), ".2f")])
    head = [f"{share(ABLATION_SPARSITY)}, b = {MAIN_BATCHES}", *map(title, data["nets"]), "the paper's ResNet-50"]
    return rows(head, body)


def summary(data: Data) -> str:
    """What the other tables come to, counted."""
    body = []

    def count(what: str, better: str, worse: str, printed: tuple[str, str] | None = None) -> None:
        """A row; the paper's side counts the cells that were measured here."""
        gains, theirs = [], []
        for net in data["nets"]:
            for column, sparsity in enumerate(COLUMNS):
                gain = difference(data, net, sparsity, better, worse)
                if gain is not None:
                    gains.append(gain)
                    if printed is not None and net in PAPER_MAIN:
                        first, second = (PAPER_MAIN[net][method][column] for method in printed)
                        theirs.append(first - second)
        sides = [
            f"{sum(g > 0 for g in side)} of {len(side)}, mean {np.mean(side):+.1f}" for side in (gains, theirs) if side
        ]
        body.append([what, *sides, *[MISSING] * (2 - len(sides))])

    for better, worse in (("asr", "bn"), ("layerwise", "bn"), ("asr", "layerwise")):
        count(f"{label(at(better))} above {label(at(worse))}", at(better), at(worse), (better, worse))
        count("... with the nets scaled", on_scaled(better), on_scaled(worse), (better, worse))
    asr = on_scaled("asr")
    own = [("bn:exact", asr), ("paired", "bn:exact"), ("refit", "paired"), ("refit", asr), ("auto", "refit")]
    for better, worse in [*((f"{method}:exact", "bn:exact") for method in ("layerwise", "raw", "asr")), *own]:
        count(f"{label(better)} above {label(worse)}", better, worse)
    return rows(["cells of 70%, 90% and 2:4 that were measured", "here: ahead, points", "paper: the same cells"], body)


TABLES: dict[str, Callable[[Data], str]] = {
    "protocol": protocol,
    "nets": nets,
    "summary": summary,
    "main": main,
    "retention": retention,
    "order": order,
    "unpruned": unpruned,
    "curve": curve,
    "gap": gap,
    "scaled": scaled,
    "epsilon": epsilon,
    "reliability": reliability,
    "severity": severity,
    "correlations": correlations,
    "ablation": ablation,
}
