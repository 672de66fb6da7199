"""Rules that several benchmarks share: how an answer is read, and how counts become figures."""
