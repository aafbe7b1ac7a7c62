"""Where prompts come from: the files that a source names, and the entries of each kind of file."""
