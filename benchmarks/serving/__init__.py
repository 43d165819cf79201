"""A server under load: ``python -m benchmarks.serving.load``."""
