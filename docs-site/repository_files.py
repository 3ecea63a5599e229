"""MkDocs hook: files of the repository that pages link to become pages of the site.

On GitHub `[own_loop.py](../examples/own_loop.py)` opens the script. The site is made of docs/ alone, so a
page that shows the file is made for it, under `repository/`, and the link goes there. Links in such pages
(CONTRIBUTING.md is one) are treated in the same way. A link to nothing is left as it is: MkDocs, being
strict, then fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md", "examples")  # in mkdocs.yml's nav
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".cff": "yaml", ".sh": "bash"}


def page_of(path: str) -> str:
    """Where the site has the repository's file ``path``, relative to docs/."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" if path.endswith(".md") else f"{FOLDER}/{path}.md"


def outside(markdown: str, path: str) -> set[str]:
    """The repository's files outside docs/ to which ``markdown``, itself the file ``path``, links."""
    found = {target(link, path) for _, link, _ in LINK.findall(markdown)}
    return {f for f in found if f is not None and not f.startswith("docs/")}


def target(link: str, path: str) -> str | None:
    """The file that ``link`` in the file ``path`` means, if the repository has it."""
    if ":" in link or link.startswith("/"):
        return None
    file = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    inside = file != "." and not file.startswith("..")
    return file if inside and (ROOT / file).exists() else None


def relinked(markdown: str, path: str) -> str:
    """``markdown`` of the repository's file ``path``, its links as the site has them."""
    here = posixpath.dirname(page_of(path))

    def there(match: re.Match[str]) -> str:
        start, link, anchor = match.groups()
        file = target(link, path)
        if file is None or (path.startswith("docs/") and file.startswith("docs/")):
            return match[0]
        return f"{start}{posixpath.relpath(page_of(file), here)}{anchor or ''}"

    return LINK.sub(there, markdown)


def shown(path: str) -> str:
    """The page that shows the repository's file or folder ``path``."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if p.is_file())
        return f"# {path}/\n\n" + "".join(f"- [{name}]({file.name}/{name}.md)\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return relinked(text, path)
    return f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n````\n"


def on_files(files: Files, /, *, config: MkDocsConfig) -> Files:
    """Add a page for each file that a page links to, and for what these link to."""
    waiting = set(ALWAYS)
    for file in files.documentation_pages():
        waiting |= outside(file.content_string, f"docs/{file.src_uri}")
    done: set[str] = set()
    while waiting - done:
        path = (waiting - done).pop()
        done.add(path)
        if (ROOT / path).is_dir():
            waiting |= {f"{path}/{p.name}" for p in (ROOT / path).iterdir() if p.is_file()}
        elif path.endswith(".md"):
            waiting |= outside((ROOT / path).read_text(encoding="utf-8"), path)
        page = File.generated(
            config, page_of(path), content=shown(path), inclusion=InclusionLevel.NOT_IN_NAV
        )
        files.append(page)
    return files


def on_page_markdown(markdown: str, /, *, page: Any, **_: Any) -> str:
    """Turn the links of docs/ that leave it."""
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return markdown
    return relinked(markdown, f"docs/{page.file.src_uri}")
