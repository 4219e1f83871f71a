"""One script per published figure, each against a named peer in one run: `python -m benchmarks.<name>`."""
