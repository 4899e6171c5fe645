"""Benchmarks: run them as modules from the root of a checkout, see README.md."""
