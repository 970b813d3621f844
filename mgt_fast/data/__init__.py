"""Crystals on disk: the dataset format, the bundled set, and the ingest of other formats."""
