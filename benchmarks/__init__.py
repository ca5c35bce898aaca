"""Benchmarks, in folders by what they measure: ``python -m benchmarks --help`` lists them."""
