"""The adapters inside their frameworks: each test file imports the one it is about, in the frameworks' environment."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported; tests of the others start processes
