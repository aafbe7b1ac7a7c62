"""What a ratio of samplers to learners gives: emulated devices, closed forms, a simulation, tables. No Ray in here."""
