"""The report of a run: one HTML page with curves, errors, worst predictions and their crystals."""

from .page import render, write_report

__all__ = ["render", "write_report"]
