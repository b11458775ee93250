"""The language model: loading, attention masks, LoRA, packing, sharding."""
