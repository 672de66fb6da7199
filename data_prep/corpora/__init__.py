"""Corpora: built from a run, reported on, shown and exported."""
