"""How declared options become those of a Typer command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from typer.core import TyperCommand

from onnx_asr.cli.parameters import shared_defaults
from onnx_asr.cli.supervision import announce

T = TypeVar("T")


class Command(TyperCommand):
    """A command that announces its models, and whose help states what the pipelines know (methods, defaults)."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the help, filled in."""
        self.fill_in()
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; whoever supervises it is told what it works on."""
        given = ctx.params
        announce(given.get("session_timeout", 0.0), filter(None, (given.get("model"), given.get("dense"))))
        return super().invoke(ctx)

    def fill_in(self) -> None:
        """Put names and defaults into the help texts; only now the options' module is imported."""
        from onnx_asr.data.preprocessing import PRESETS
        from onnx_asr.pruning.options import SCORES, SENSITIVITY_SPARSITIES
        from onnx_asr.repairing.options import METHODS
        from onnx_asr.sweeping.grid import SWEEP_METHODS

        known = shared_defaults()
        shared = any(parameter.name == "verify_samples" for parameter in self.params)
        for parameter in self.params:
            shown: Any = parameter  # options and arguments both have a help text
            if shared and shown.name in known:
                shown.default = known[shown.name]
            for name, values in (
                ("{methods}", METHODS),
                ("{sweep_methods}", SWEEP_METHODS),
                ("{presets}", PRESETS),
                ("{scores}", SCORES),
                ("{sensitivity}", map(str, SENSITIVITY_SPARSITIES)),
            ):
                shown.help = (shown.help or "").replace(name, ", ".join(values))


def spread(function: Callable[..., T]) -> Callable[..., T]:
    """Turn each parameter that is a dataclass into its fields, for Typer; the function still gets the dataclass."""
    hints = {name: _annotated(hint) for name, hint in get_type_hints(function, include_extras=True).items()}
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            flat += _options(hints[name])
        else:
            flat.append(_keyword(name, parameter.default, hints[name]))

    @wraps(function)
    def call(**values: Any) -> T:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return function(**built, **values)

    call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    del call.__wrapped__
    return call


def _options(group: Any) -> Iterator[inspect.Parameter]:
    """The fields of a group, each an option in the group's panel of the help."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, declared = get_args(hints[field.name])
        option = copy(declared)
        option.rich_help_panel = group.panel
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield _keyword(field.name, default, Annotated[kind, option])


def _annotated(hint: Any) -> Any:
    """Python 3.10 hides the hint of a parameter with the default None in an Optional; take it out again."""
    return next((inner for inner in get_args(hint) if get_origin(inner) is Annotated), hint)


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
