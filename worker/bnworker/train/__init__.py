"""The main job: training a multi-layer perceptron, data-parallel, with synchronized batch normalization."""
