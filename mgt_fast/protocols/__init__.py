"""Protocols: published benchmarks with their official splits, settings and figures; see `recipe`."""
