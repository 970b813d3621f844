"""Links of Markdown files that are read on the repository's pages as well.

Files outside of docs/ are included into pages, and pages link to files outside of docs/. Here every relative
link becomes one to the page that shows the file, or to the file itself, copied beside the pages.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
    "mgt_fast/data/bundled/README.md": "bundled.md",
}
"""Pages that show a file of the repository, by its path."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/<])([^)\s#]*)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"\s*(```|~~~)")


def rewrite_links(text: str, folder: str, page_folder: str = "docs") -> str:
    """Return Markdown whose relative links fit a page.

    Args:
        text: Markdown, its links relative to `folder`.
        folder: where the text stands, from the root of the repository.
        page_folder: where the page stands.

    Raises:
        FileNotFoundError: for a link to nothing.
    """

    def target(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if path in PAGES:
            path = f"docs/{PAGES[path]}"
        elif not (ROOT / path).exists():
            raise FileNotFoundError(f"a link of {folder or 'the root'} leads to {path}, which is not there")
        return posixpath.relpath(path, page_folder) + (match[2] or "")

    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= bool(_FENCE.match(line))
        lines.append(line if fenced else _LINK.sub(target, line))
    return "\n".join(lines)


def _page(app, docname, content):
    folder = posixpath.join("docs", posixpath.dirname(docname)).rstrip("/")
    content[0] = rewrite_links(content[0], folder, folder)


def _included(app, path, docname, content):
    file = (Path(app.srcdir) / path).resolve()
    if file.suffix == ".md" and ROOT in file.parents:
        folder = file.parent.relative_to(ROOT).as_posix()
        content[0] = rewrite_links(content[0], "" if folder == "." else folder)


def setup(app):
    """Rewrite the links of every page and of what pages include."""
    app.connect("source-read", _page)
    app.connect("include-read", _included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
