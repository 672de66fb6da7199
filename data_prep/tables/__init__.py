"""Rows of published data sets: read from JSON lines, parquet or archives, checked, and imported into a corpus."""
