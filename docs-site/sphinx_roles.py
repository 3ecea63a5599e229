"""Griffe extension: Sphinx's roles in docstrings, as Markdown's cross-references.

Docstrings say :func:`name`, which editors and `help()` show well. Where the reference is to a name of the API
pages it becomes a link, else plain code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
LITERAL = re.compile(r"(?<!`)``(?!`)(.+?)``(?!`)", re.DOTALL)
BLOCK = re.compile(r"^( *)(\S.*?)::[ ]*$|^ *::[ ]*$", re.MULTILINE)


def markdown_of(text: str, home: griffe.Object) -> str:
    """The docstring ``text`` of ``home`` without Sphinx's marks."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        path = resolved(name, home)
        return f"`{name}`" if path is None else f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

    text = ROLE.sub(link, text)
    # `text::` opens a literal block in reStructuredText; the indented block is enough for Markdown.
    return BLOCK.sub(lambda m: f"{m[1]}{m[2]}:" if m[2] else "", text)


def resolved(name: str, home: griffe.Object) -> str | None:
    """The full path of ``name`` as seen from ``home``."""
    for scope in (home, home.parent):
        if scope is None:
            continue
        try:
            if isinstance(scope, griffe.Class) and name in scope.members:
                return f"{scope.path}.{name}"
            return scope.resolve(name)
        except (griffe.NameResolutionError, AttributeError):
            continue
    return name if name.startswith("marginflow.") else None


class SphinxRoles(griffe.Extension):
    """Rewrites each docstring once the package is loaded, when names can be resolved."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all objects of the package."""
        self._visit(pkg)

    def _visit(self, scope: griffe.Object) -> None:
        if scope.docstring:
            scope.docstring.value = markdown_of(scope.docstring.value, scope)
        for member in scope.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)
