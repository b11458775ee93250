"""The LightningModules, and the use of trained ones: export, generation, adaptation to new users."""
