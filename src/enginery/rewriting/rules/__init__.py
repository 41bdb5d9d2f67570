"""The rules, one transformation a file; each file begins with its equation. `pipeline.py` knows their order."""
