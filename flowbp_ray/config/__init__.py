"""A run's configuration: sections of plain values, how they must fit together, and how they are read from YAML."""
