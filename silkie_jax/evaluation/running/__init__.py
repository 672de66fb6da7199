"""How a benchmark is run: answers, judges' replies, scores, comparisons."""
