"""Benchmarks: pytest-benchmark suites and the scripts that print the figures the docs quote."""
