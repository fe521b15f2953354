"""Benchmarks: results are asserted before they are timed, and figures are ratios within one run."""
