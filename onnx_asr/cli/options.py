"""Options of the command line, read off what declares them: a command's parameters, and the fields of dataclasses.

Name, type and default of an option are those of its field; its help text is in the docstring of the class, under
"Attributes:". So the options classes of the library serve as they are. A dataclass within a dataclass is flattened;
where both have a field of one name, the inner one takes the outer one's value.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from onnx_asr.errors import OptionError

REQUIRED: Any = object()
"""In place of the default of what has to be given."""


@dataclass(frozen=True)
class Form:
    """How an option is written, where name and type do not say.

    Attributes:
        metavar: Stands for its value in the help.
        help: Help text of a parameter; that of a field is in the docstring of its class.
        names: Its names; one without dashes makes it an argument.
        read: Makes a value of its text.
    """

    metavar: str = ""
    help: str = ""
    names: tuple[str, ...] = ()
    read: Callable[[str], Any] = str


@dataclass(frozen=True)
class Given:
    """Marks a dictionary that takes those fields of some classes that are given.

    Attributes:
        classes: Classes without further ones in them, by when they apply; a name that several have is one option.
        overriding: The values replace others that are not known here, so that no defaults are shown.
    """

    classes: Mapping[str, type]
    overriding: bool = False


@dataclass(frozen=True)
class Option(Form):
    """One option or argument.

    Attributes:
        kind: A "list" is given repeatedly; a "pair" is a flag with its opposite, ``--no-...``.
        default: Or REQUIRED.
        panel: Heading in the help.
    """

    kind: Literal["value", "list", "flag", "pair"] = "value"
    default: Any = REQUIRED
    panel: str = "Options"

    @property
    def key(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.default is REQUIRED

    @property
    def is_argument(self) -> bool:
        """Whether it is given without a name."""
        return not self.key.startswith("-")

    @property
    def shown_default(self) -> str:
        """The default, as text; empty where there is none to show."""
        if self.required or self.kind == "flag" or self.default in (None, ()):
            return ""
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return "on" if self.kind == "pair" else str(self.default)


@dataclass(frozen=True)
class Group:
    """Options that are made into one object.

    Attributes:
        make: Makes the object of its members' values, those that are given.
        members: Options and groups by name.
        shared: Names of further arguments, which come from outside.
    """

    make: Callable[..., Any]
    members: Mapping[str, Option | Group]
    shared: Iterable[str] = ()

    def options(self) -> Iterator[Option]:
        """All options, those of groups in it too."""
        for member in self.members.values():
            yield from member.options() if isinstance(member, Group) else (member,)

    def made(self, given: Mapping[str, Any], outside: Mapping[str, Any]) -> Any:
        """The object, from the values of options by key."""
        values = {name: outside[name] for name in self.shared if name in outside}
        for name, member in self.members.items():
            if isinstance(member, Option) and member.key in given:
                values[name] = tuple(given[member.key]) if member.kind == "list" else given[member.key]
        inner = {name: item.made(given, values) for name, item in self.members.items() if isinstance(item, Group)}
        return self.make(**values, **inner)


@dataclass(frozen=True)
class Declarations:
    """How the options classes appear on the command line.

    Attributes:
        forms: Forms of fields, by name.
        panels: Headings of fields by name of the class; "" stands for the fields that have none of their own.
        without: Headings and names that a command does not offer.
    """

    forms: Mapping[str, Form]
    panels: Mapping[str, Mapping[str, str]]
    without: Sequence[str] = ()

    def group_of(self, owner: Any, shared: Iterable[str] = ()) -> Group:
        """The options that a function or a dataclass takes, but for what comes from outside."""
        hints, helps = get_type_hints(owner, include_extras=True), _attributes(owner)
        titles = self.panels.get(owner.__name__, {})
        defaults = dict(_defaults(owner))
        members: dict[str, Option | Group] = {}
        for name in (name for name in defaults if name not in shared):
            kind, mark = _unwrapped(hints[name])
            panel = titles.get(name, titles.get("", "Options"))
            if isinstance(mark, Given):
                members[name] = self._any_of(mark, defaults)
            elif is_dataclass(kind):
                members[name] = self.group_of(kind, defaults.keys() & {field.name for field in fields(kind)})
            elif not {name, panel} & set(self.without):
                form = mark or self.forms.get(name, Form())
                form = replace(form, help=form.help or helps.get(name, ""), names=form.names or (_flag(name),))
                members[name] = _option(kind, defaults[name], panel, form)
        return Group(owner, members, shared)

    def _any_of(self, mark: Given, taken: Iterable[str]) -> Group:
        """Fields of any of some classes, but names that are taken; a default is shown if all classes agree on it."""
        members: dict[str, Option | Group] = {}
        for when, owner in mark.classes.items():
            for name, member in self.group_of(owner, taken).members.items():
                assert isinstance(member, Option)
                known = members.setdefault(name, replace(member, help=f"{when}{member.help}"))
                assert isinstance(known, Option)
                if mark.overriding or known.default != member.default:
                    members[name] = replace(known, default=None)
        return Group(dict, members)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _defaults(owner: Any) -> Iterator[tuple[str, Any]]:
    declared = fields(owner) if is_dataclass(owner) else inspect.signature(owner).parameters.values()
    for item in declared:
        yield item.name, REQUIRED if item.default in (MISSING, inspect.Parameter.empty) else item.default


def _unwrapped(hint: Any) -> tuple[Any, Form | Given | None]:
    """A type without None and annotations, and what it is annotated with."""
    mark = None
    while True:
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            mark = next((note for note in notes if isinstance(note, (Form, Given))), mark)
        elif get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint):
            hint = Union[tuple(kind for kind in get_args(hint) if kind is not type(None))]  # noqa: UP007
        else:
            return hint, mark


def _option(kind: Any, default: Any, panel: str, form: Form) -> Option:
    if kind is bool:
        return Option("", form.help, form.names, kind="pair" if default else "flag", default=default, panel=panel)
    several = get_origin(kind) in (tuple, Sequence)
    repeated = several and default in ((), REQUIRED)
    metavar, read = _reader(get_args(kind)[0] if several else kind)
    if several and not repeated:
        metavar, read = f"{metavar}[,{metavar}]", _listed(read)
    if not form.names[0].startswith("-"):
        metavar, panel = form.names[0] + "..." * repeated, "Arguments"
    read = read if form.read is str else form.read
    return Option(form.metavar or metavar, form.help, form.names, read, "list" if repeated else "value", default, panel)


def _reader(kind: Any) -> tuple[str, Callable[[str], Any]]:
    """What stands for a value of a type, and what reads it."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind)), str
    if get_origin(kind) in (Union, UnionType):  # of names and a number
        return f"{_reader(get_args(kind)[0])[0]}|X", _number_or_name
    return {int: ("N", _whole_number), float: ("X", _number)}.get(kind, ("TEXT", str))


def _listed(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(read(part.strip()) for part in text.split(",") if part.strip())


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"'{text}' is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"'{text}' is not a number") from None


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _attributes(owner: Any) -> dict[str, str]:
    """Descriptions of fields, from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(getattr(owner, "__mro__", ())):
        _, _, text = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        for name, description in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE):
            found[name] = " ".join(description.replace("``", "").split())
    return found
