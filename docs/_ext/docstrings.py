"""Docstrings are plain text with code between backticks and in indented blocks, not reStructuredText."""

import re


def as_restructured_text(lines: list[str]) -> list[str]:
    """Escape |r|, which is a length and no substitution, and mark indented blocks as code."""
    lines = [re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", line) for line in lines]
    return re.sub(r"(?m)^(.*):(\n\n {4})", r"\1::\2", "\n".join(lines)).split("\n")


def _before_napoleon(app, what, name, obj, options, lines):
    lines[:] = as_restructured_text(lines)


def _signature(app, what, name, obj, options, signature, return_annotation):
    """Show what a dataclass makes anew for each object as `...`, which is Python."""
    return signature and signature.replace("<factory>", "..."), return_annotation


def setup(app):
    """Adapt every docstring before napoleon reads its sections."""
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
