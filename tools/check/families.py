"""Run every command on small twins of well-known network families, as installed, and tell what came of it.

    python -m tools.check.families --markdown docs/graphs.md
    python -m tools.check.families --only YOLO ViT --keep twins/

Each family's structure is rebuilt with random weights (tools/check/twins.py) and goes through inspect, prune (50% by
magnitude, 2:4, channels), repair (auto, refit, paired, bn), shrink, compress (one round) and evaluate, on random data.

    a number   output SNR in dB against the dense model, on samples that no command saw, for the file it wrote
    yes        the command ended well; a file that it wrote is accepted and run by onnxruntime, and is finite
    no better  exit code 1: a repair that was no closer to the dense model was not written
    refused    exit code 2, one line of error, no file; the table has the reason below
    FAULT      anything else: a traceback, another exit code, a file that cannot be used or is not finite, a repair that
               was written although it is further from the dense model than its input
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from tools.arguments import script_parser
from tools.check.graphs import replace_table, snr
from tools.check.twins import FAMILIES, Twin, twin

TOOL = Path(sys.executable).with_name("onnx-resuscitate")
SAMPLES, UNSEEN = 96, 32
SIZES = ("--samples", "64", "--verify-samples", "32")
WORSE = (
    0.5  # dB by which a repair may be further away on samples that it did not see, and by another measure than its own
)
COLUMNS = (
    "inspect",
    "50%",
    "auto",
    "refit",
    "paired",
    "bn",
    "shrink",
    "2:4",
    "refit 2:4",
    "channels",
    "refit channels",
)
MORE = ("compress", "evaluate")


@dataclass
class Outcome:
    """What came of one command.

    Attributes:
        cell: For the table.
        note: The reason of a refusal or a fault.
    """

    cell: str
    note: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it must not be."""
        return self.cell == "FAULT"


@dataclass
class Trial:
    """The commands on one twin, in a folder of its own."""

    twin: Twin
    folder: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, methods: Sequence[str] = ("auto", "refit", "paired", "bn")) -> None:
        """Run all commands."""
        onnx.save(self.twin.model, self.folder / "dense.onnx")
        np.savez(self.folder / "data.npz", **self.twin.samples(SAMPLES, seed=0))  # type: ignore[arg-type]
        self._command("inspect", "inspect", "dense.onnx", "--json")
        self._command("50%", "prune", "dense.onnx", "--sparsity", "0.5", writes="pruned.onnx")
        for method in methods:
            self._repair(method, "pruned.onnx", method)
        self._command("shrink", "shrink", "pruned.onnx", writes="shrunk.onnx")
        self._command("2:4", "prune", "dense.onnx", "--pattern", "2:4", writes="pattern.onnx")
        self._repair("refit 2:4", "pattern.onnx", "refit")
        self._command(
            "channels", "prune", "dense.onnx", "--pattern", "channel", "--sparsity", "0.3", writes="small.onnx"
        )
        self._repair("refit channels", "small.onnx", "refit")
        rounds = ("--sparsity", "0.5", "--rounds", "1", "--data", "data.npz", *SIZES)
        self._command("compress", "compress", "dense.onnx", *rounds, writes="compressed.onnx")
        if (self.folder / "pruned.onnx").exists():
            self._command("evaluate", "evaluate", "pruned.onnx", "--dense", "dense.onnx", "--data", "data.npz")

    def _repair(self, column: str, model: str, method: str) -> None:
        if not (self.folder / model).exists():
            return
        arguments = ("--dense", "dense.onnx", "--data", "data.npz", "--method", method, *SIZES)
        self._command(column, "repair", model, *arguments, writes=f"{column.replace(':', '')}.onnx", given=model)

    def _command(self, column: str, *arguments: str, writes: str = "", given: str = "") -> None:
        output = ("-o", writes) if writes else ()
        done = subprocess.run([TOOL, *arguments, *output], cwd=self.folder, capture_output=True, text=True, check=False)
        lines = done.stderr.strip().splitlines()
        written = bool(writes) and (self.folder / writes).exists()
        if "Traceback" in done.stderr or done.returncode not in (0, 1, 2):
            self.outcomes[column] = Outcome("FAULT", f"exit code {done.returncode}: {lines[-1] if lines else ''}")
        elif done.returncode and written:
            self.outcomes[column] = Outcome(
                "FAULT", f"exit code {done.returncode}, and a file: {lines[-1] if lines else ''}"
            )
        elif done.returncode == 2:
            error = next((line for line in lines if line.startswith("error: ")), "")
            self.outcomes[column] = Outcome("refused" if error else "FAULT", error.removeprefix("error: "))
        elif done.returncode == 1:
            self.outcomes[column] = Outcome("no better")
        elif not writes:
            self.outcomes[column] = Outcome("yes")
        else:
            self.outcomes[column] = self._judged(writes, given)

    def _judged(self, name: str, given: str) -> Outcome:
        """A file that was written, against what it was made from."""
        try:
            found = self._outputs(name)
        except Exception as error:  # onnxruntime raises whatever it likes
            return Outcome("FAULT", f"{name}: {str(error).splitlines()[0]}")
        if not all(np.isfinite(value.astype(np.float64)).all() for value in found):
            return Outcome("FAULT", f"{name}: outputs are not finite")
        dense = self._outputs("dense.onnx")
        if any(node.op_type == "NonMaxSuppression" for node in self.twin.model.graph.node):
            return Outcome("yes")  # of other boxes
        quality = snr(dense, found)
        if given and quality < snr(dense, self._outputs(given)) - WORSE:
            return Outcome("FAULT", f"{name}: further from the dense model than {given}")
        return Outcome("same" if np.isinf(quality) else f"{quality:.1f}")

    def _outputs(self, name: str) -> list[NDArray[Any]]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        path = str(self.folder / name)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        samples = self.twin.samples(UNSEEN, seed=1)
        fixed = session.get_inputs()[0].shape[0]
        step = fixed if isinstance(fixed, int) else UNSEEN
        parts = [
            session.run(None, {key: value[start : start + step] for key, value in samples.items()})
            for start in range(0, UNSEEN, step)
        ]
        joined = zip(*parts, strict=True)
        return [np.concatenate([np.asarray(part).ravel() for part in output]) for output in joined]


def table(trials: Sequence[Trial]) -> list[str]:
    """The outcomes as a table of Markdown, with the reasons below."""
    columns = (*COLUMNS, *MORE)
    lines = [f"| family | structure | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        cells = [trial.outcomes[column].cell if column in trial.outcomes else "-" for column in columns]
        lines.append(f"| {trial.twin.name} | {trial.twin.structure} | {' | '.join(cells)} |")
        for column, outcome in trial.outcomes.items():
            if outcome.note:
                reasons.setdefault(f"{outcome.cell}: {outcome.note}", []).append(f"{trial.twin.name} ({column})")
    return [*lines, "", *(f"* {', '.join(where)}: {reason}" for reason, where in reasons.items())]


def tried(names: Sequence[str], folder: Path, report: Callable[[Trial], None] = lambda _: None) -> list[Trial]:
    """Run the twins of families whose names contain one of these, each in a folder below one."""
    trials = []
    for number, name in enumerate(FAMILIES):
        if names and not any(part in name for part in names):
            continue
        place = folder / f"{number:02}"
        place.mkdir(parents=True)
        trial = Trial(twin(name), place)
        trial.run()
        trials.append(trial)
        report(trial)
    return trials


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="run only families whose name contains one of these")
    parser.add_argument("--keep", type=Path, help="a new folder for all files")
    parser.add_argument("--markdown", type=Path, help="file in which the table between <!-- families --> is replaced")
    arguments = parser.parse_args()

    def report(trial: Trial) -> None:
        cells = " ".join(f"{column}={outcome.cell}" for column, outcome in trial.outcomes.items())
        print(f"{trial.twin.name}: {cells}", flush=True)
        for column, outcome in trial.outcomes.items():
            if outcome.note:
                print(f"    {column}: {outcome.cell}: {outcome.note}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trials = tried(arguments.only, arguments.keep or Path(folder), report)
    if arguments.markdown:
        replace_table(arguments.markdown, "families", table(trials))
    if any(outcome.is_fault for trial in trials for outcome in trial.outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
