"""What a run leaves for people: summary, tables and curves; exports with their model card."""
