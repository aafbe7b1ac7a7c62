"""The trained weights: their selection, their buckets and packing for publication, their fingerprint."""
