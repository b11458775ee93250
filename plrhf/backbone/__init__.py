"""The language model: loading, attention masks, LoRA, packing, sharding."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then warns of a kernel that it does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
