"""Benchmarks of lorasurgery beside its peers; see README.md."""
