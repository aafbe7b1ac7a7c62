"""The documentation site: figures drawn from plans, reference pages read from the code, hooks for MkDocs."""
