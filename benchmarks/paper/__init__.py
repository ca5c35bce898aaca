"""The claims of the AdaRound paper, measured again on networks that train in seconds.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv:2004.10568. A file an experiment; docs/method.md explains the method with what they find.

    python -m benchmarks paper [--quick] [--output FOLDER] [NAME ...]
    python -m benchmarks paper --tables [NAME ...]
"""
