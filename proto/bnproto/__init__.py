"""The wire: the protocol's messages (`v1`), and the only code that turns them into the layer's values and back."""
