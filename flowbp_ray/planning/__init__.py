"""Will it fit: memory, traffic and work of a run from the model's config.json alone."""
