"""Published claims about low-precision training, measured again: claim, measured value, verdict.

`python -m reproduce` runs every script and writes RESULTS.md; `python -m reproduce.NAME` runs one.
"""
