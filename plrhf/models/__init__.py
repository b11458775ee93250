"""The LightningModules, and what is done with a trained one: export, generation, adaptation."""
