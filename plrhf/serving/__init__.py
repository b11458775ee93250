"""Serving: an HTTP server that learns people from their judgments and writes for each of them."""
