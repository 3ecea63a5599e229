"""Griffe extension: the docstrings of src/ as the API pages show them.

Docstrings are written for `help()` and editors; four things read better on a page, or need to be said
to griffe, which reads the sources without running them:

- Sphinx's roles, :func:`name`, become links to the name, or plain code where no page has it;
- entries for several names, "lower, upper: …", become one entry for each;
- private bases are left out;
- where a function bears the name of its file (`references.kappa`), the package's name is the function.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
LITERAL_BLOCK = re.compile(r"::[ ]*$", re.MULTILINE)
SECTION = re.compile(r"(?:Args|Attributes):$")
SHARED = re.compile(r"( +)(\w+(?:, \w+)+): (.*)")


class Docstrings(griffe.Extension):
    """Works on the whole package once it is loaded, when names can be resolved."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all objects of the package."""
        _visit(pkg)
        _functions_before_files(pkg)


def _visit(scope: griffe.Object) -> None:
    if scope.docstring:
        text = ROLE.sub(lambda match: _link(match[1], scope), scope.docstring.value)
        # Opens a literal block in reStructuredText; the block's indentation is enough for Markdown.
        text = LITERAL_BLOCK.sub(lambda match: ":" if match.start() else "", text)
        scope.docstring.value = _one_name_each(re.sub(r"^ *:$", "", text, flags=re.MULTILINE))
    if isinstance(scope, griffe.Class):
        scope.bases = [base for base in scope.bases if not str(base).startswith("_")]
    for member in list(scope.members.values()):
        if isinstance(member, griffe.Object):
            _visit(member)


def _link(name: str, home: griffe.Object) -> str:
    path = _resolved(name, home)
    if path is None:
        return f"`{name}`"
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'


def _resolved(name: str, home: griffe.Object) -> str | None:
    """The full path of ``name`` as seen from ``home``: of the class, of its module, or in full."""
    scope: griffe.Object | None = home
    while scope is not None:
        if name in scope.members:
            return f"{scope.path}.{name}"
        scope = scope.parent if not scope.is_module else None
    if name.startswith("marginflow."):
        return name
    try:
        return home.resolve(name)
    except griffe.NameResolutionError:
        return None


def _one_name_each(text: str) -> str:
    """Entries for several names, repeated for each of them."""
    lines, out, inside, k = text.split("\n"), [], False, 0
    while k < len(lines):
        line = lines[k]
        if line and not line.startswith(" "):
            inside = SECTION.match(line) is not None
        shared = SHARED.match(line) if inside else None
        k += 1
        if shared is None:
            out.append(line)
            continue
        indent, names, first = shared.groups()
        more = []
        while k < len(lines) and lines[k].startswith(indent + " "):
            more.append(lines[k])
            k += 1
        for name in names.split(", "):
            out += [f"{indent}{name}: {first}", *more]
    return "\n".join(out)


def _functions_before_files(pkg: griffe.Module) -> None:
    modules = [pkg, *pkg.modules.values()]
    # First everything is looked up, for some of it by way of these files.
    meant = {
        (module.path, name): _target(m) for module in modules for name, m in module.members.items()
    }
    for module in modules:
        for name in map(str, module.exports or ()):
            file = meant.get((module.path, name))
            if isinstance(file, griffe.Module) and name == file.name and name in file.members:
                module.members[name] = griffe.Alias(name, file.members[name], parent=module)


def _target(member: griffe.Object | griffe.Alias) -> griffe.Object | None:
    try:
        return member.final_target if isinstance(member, griffe.Alias) else member
    except griffe.AliasResolutionError:
        return None  # of another library
