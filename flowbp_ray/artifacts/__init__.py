"""What a run leaves for people: summary, curves and tables, exports and their model card."""
