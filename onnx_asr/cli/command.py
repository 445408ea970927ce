"""What every command has: options in groups, help that states what the pipelines know, a check of the environment."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from importlib.metadata import packages_distributions
from typing import Any, TypeVar, get_type_hints

from typer.core import TyperCommand

from onnx_asr.cli.parameters import Method
from onnx_asr.errors import OnnxAsrError

DISTRIBUTION, _PACKAGE = "onnx-resuscitate", "onnx_asr"

T = TypeVar("T")


class Command(TyperCommand):
    """A command whose help states what the pipelines know: methods, presets, defaults."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Fill in the help texts, then show them; only now the pipelines are imported."""
        from onnx_asr.data import PRESETS
        from onnx_asr.demo import embedded_files
        from onnx_asr.repair import METHODS, RepairOptions

        known = {"{methods}": METHODS, "{presets}": PRESETS, "{nets}": embedded_files()}
        defaults = RepairOptions() if any(parameter.name == "method" for parameter in self.params) else None
        of_repair = {field.name for field in fields(Method)}
        for parameter in self.params:
            if defaults is not None and parameter.name in of_repair:
                parameter.default = getattr(defaults, parameter.name)
            for name, values in known.items():
                if name in (getattr(parameter, "help", None) or ""):
                    parameter.help = parameter.help.replace(name, ", ".join(values))  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, in an environment that has one owner of the package."""
        check_sole_owner()
        return super().invoke(ctx)


def check_sole_owner() -> None:
    """Refuse to work beside another distribution that installs files into the same import package.

    Raises:
        OnnxAsrError: Naming it. onnx-asr, for speech recognition, is one.
    """
    owners = {name.lower().replace("_", "-") for name in packages_distributions().get(_PACKAGE, [])}
    others = ", ".join(sorted(owners - {DISTRIBUTION}))
    if others:
        raise OnnxAsrError(
            f"another distribution ({others}) installs the import package '{_PACKAGE}' too, and the two overwrite "
            f"each other's files: uninstall both, then install {DISTRIBUTION} in an environment of its own"
        )


def spread(function: Callable[..., T]) -> Callable[..., T]:
    """Turn each parameter that is a dataclass into its fields, for Typer; the function still gets the dataclass."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            inner = get_type_hints(hints[name], include_extras=True)
            for field in fields(groups[name]):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                flat.append(_keyword(field.name, default, inner[field.name]))
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


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
