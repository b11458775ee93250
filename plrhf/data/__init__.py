"""From a source of preference rows to batches: rows, splits, features, tokens, packing, cache."""
