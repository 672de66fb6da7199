"""Benchmarks for any checkpoint: answers from the engine or an endpoint, scored apart by the official rules.

One file a benchmark (`mme.py`, ...), listed in `table.py`; what a benchmark is to the rest stands in `benchmark.py`.
`rules/` holds what several share, `running/` how answers, judges' replies and scores come about.
"""
