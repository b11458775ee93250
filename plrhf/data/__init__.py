"""From a source of preference rows to batches: splits, features, tokens, packing, cache."""
