"""Version 1 of the protocol: `statistics.proto`, and the stubs made from it."""
