"""Workloads: the networks, layers and data that benchmarks and examples share."""
