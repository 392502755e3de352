"""The adapters inside their frameworks: each test file imports the one it is about, in the frameworks' environment."""
