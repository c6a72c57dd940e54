"""Slow, obvious answers that tests and benchmarks compare with."""
