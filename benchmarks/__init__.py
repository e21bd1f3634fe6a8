"""Benchmarks of lorasurgery against its peers; see README.md."""
