"""What the layer costs, beside the memory's speed and beside its peers: `python -m benchmarks`."""
