"""The files and the exit code of a command: models read once, outputs checked before the work begins, then written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_asr.cli.terminal import Terminal, say
from onnx_asr.cli.values import Paths
from onnx_asr.errors import OptionError
from onnx_asr.files.outputs import READER_PATIENCE, STDIN, Destination, size_text

if TYPE_CHECKING:
    import onnx

    from onnx_asr.data import Preprocessing
    from onnx_asr.graph.model_io import ModelSource
    from onnx_asr.repairing.result import RepairResult
    from onnx_asr.report.data import ReportValues, Run

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Inputs:
    """What a command reads, by the names of the options.

    Attributes:
        models: Models, whose weights may be in further files.
        data: Folders of images, or files: one or several.
        tables: Other files.
        edited: The model that the command writes a new version of, which may replace it.
    """

    models: Mapping[str, str | None] = field(default_factory=dict)
    data: Mapping[str, Paths | None] = field(default_factory=dict)
    tables: Mapping[str, str | None] = field(default_factory=dict)
    edited: str | None = None

    def samples(self) -> Iterator[tuple[str, str]]:
        """The paths of the data, one by one, by the names of the options."""
        for name, given in self.data.items():
            yield from ((name, path) for path in ([given] if isinstance(given, str) else given or ()))


@dataclass(frozen=True)
class Outputs:
    """What a command writes: all of it is checked before any work is done.

    Attributes:
        terminal: Prints the results: on stderr where an output takes stdout.
        places: The destinations, by the names of the options.
    """

    terminal: Terminal
    places: Mapping[str, Destination]

    @classmethod
    def of(
        cls,
        terminal: Terminal,
        inputs: Inputs,
        *,
        model: str | None = None,
        table: str | None = None,
        report: str | None = None,
        plot: str | None = None,
        junit: str | None = None,
    ) -> Outputs:
        """From the paths that were given; ``model`` and ``table`` are what --output is in different commands.

        Raises:
            OptionError: A library is missing, the format of a plot is unknown, an output is an input or another
                output, or stdout would have to take two of them.
            OutputError: An output cannot be written.
        """
        places = {} if model is None else {"--output": Destination.of(model)}
        if report is not None or plot is not None:
            from onnx_asr.report import check_format, check_libraries

            for option in (name for name, path in {"--report": report, "--plot": plot}.items() if path is not None):
                check_libraries(option)
            if plot is not None:
                check_format(plot)
        texts = {"--output": table, "--report": report, "--plot": plot, "--junit": junit}
        places |= {option: Destination.of(path, text=True) for option, path in texts.items() if path is not None}
        for (first, one), (second, other) in combinations(places.items(), 2):
            if one.is_at(other.path) or (one.descriptor is not None and one.descriptor == other.descriptor):
                raise OptionError(f"{second} and {first} both name '{other.path}': give each its own file")
        for option, place in places.items():
            _check_inputs_stay(option, place, inputs)
        if inputs.edited is not None and model is not None and not places["--output"].takes_data:
            from onnx_asr.graph.external import fits_one_file
            from onnx_asr.graph.model_io import check_embeddable

            check_embeddable(fits_one_file(Path(inputs.edited)), places["--output"])
        taken = next((option for option, place in places.items() if place.descriptor == 1), None)
        if taken is not None and terminal.json:
            raise OptionError(f"--json prints on standard output, and {taken} writes there: drop one of them")
        for option in (option for option, place in places.items() if place.is_fifo):
            what = f"{option} '{places[option].path}' is a pipe"
            say("warning", f"{what}: when the work is done, something has to read it within {READER_PATIENCE} seconds")
        return cls(replace(terminal, aside=taken is not None), places)

    def path(self, option: str) -> Path | None:
        """Where an output goes, if it is wanted."""
        place = self.places.get(option)
        return None if place is None else place.path

    def write_model(self, result: onnx.ModelProto, source: str) -> str:
        """Write a model, with its weights beside it where the given model has them so; its path."""
        from onnx_asr.graph.external import data_files, remove_obsolete
        from onnx_asr.graph.model_io import is_external, save

        place = self.places["--output"]
        before = frozenset() if place.file is None else data_files(place.file) | data_files(place.path)
        save(result, place.path, external_data=is_external(source))
        if before and place.file is not None:
            kept = {file.resolve() for file in data_files(place.file)}
            old = {file.resolve(): file for file in sorted(before) if file.resolve() not in kept}
            remove_obsolete(before - data_files(place.file), place.file)
            for file in old.values():
                if file.exists():
                    what = f"'{file}' ({size_text(file.stat().st_size)})"
                    say("warning", f"{what} is no longer read by '{place.path}': remove it if nothing else reads it")
        return str(place.path)

    def page(
        self,
        gather: Callable[[Run], ReportValues],
        files: dict[str, Paths | None],
        preprocessing: Preprocessing | None = None,
    ) -> ReportValues | None:
        """What the report says about this call; None where none is wanted."""
        if "--report" not in self.places:
            return None
        from onnx_asr.report.data import Run

        return gather(Run(self.terminal.command, self.terminal.line, files, preprocessing))

    def write_page(self, values: ReportValues | None) -> None:
        """Write the report, if one is wanted."""
        if values is not None:
            from onnx_asr.report.html import write_report

            write_report(values, self.places["--report"].path)


def given_model(model: str, external_links: bool) -> ModelSource:
    """A model as the library takes it: a path, or what a pipe, which can be read only once, or links lead to."""
    if not external_links and Path(model).is_file() and Path(model) != STDIN:
        return model
    from onnx_asr.engine.loading import load

    return load(model, external_links=external_links)


def verdict(result: RepairResult, what: str, before: str, target: Path, force: bool) -> int:
    """The exit code of a command that writes only what is no further from the dense model than before."""
    if result.improved:
        return DONE
    kept = f"'{target}' was written because of --force" if force else f"'{target}' was not written (--force writes it)"
    if result.modified:
        say("warning", f"the {what} is further from the dense model than {before}; {kept}")
    else:
        say("warning", f"no {what} is as close to the dense model as {before}, which is given back unchanged; {kept}")
    return CHECK_FAILED


def _check_inputs_stay(option: str, place: Destination, inputs: Inputs) -> None:
    """Refuse an output that is one of the inputs, by whatever links.

    Raises:
        OptionError: Naming both.
    """
    from onnx_asr.graph.external import data_files

    edited = {} if option == "--output" or inputs.edited is None else {"the given model": inputs.edited}
    for name, path in (*{**edited, **inputs.models, **inputs.tables}.items(), *inputs.samples()):
        if path is not None and place.is_at(path):
            raise OptionError(f"{option} would replace '{path}', which is read ({name}): give another file")
    models = (inputs.edited, *inputs.models.values()) if place.path.exists() else ()
    for model in (path for path in models if path is not None):
        if any(place.is_at(file) for file in data_files(Path(model))):
            raise OptionError(
                f"{option} would replace '{place.path}', which holds weights of '{model}': give another file"
            )
    for name, path in inputs.samples():
        if any(place.is_at(file) for file in _images(place, Path(path))):
            raise OptionError(f"{option} '{place.path}' is an image in the data of {name}: give a file elsewhere")


def _images(place: Destination, folder: Path) -> Iterator[Path]:
    """Images among the samples, if the output can be one: it is there, or would be a new image in their folder."""
    from onnx_asr.data.folders import images_of
    from onnx_asr.data.labels import IMAGE_SUFFIXES

    if place.file is None:
        return
    if place.file.exists():
        yield from images_of(folder)
    elif place.file.suffix.lower() in IMAGE_SUFFIXES and _within(place.file, folder):
        yield place.file


def _within(file: Path, folder: Path) -> bool:
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
