"""The trained weights on their way: which they are, in which buckets and arrays they travel, whether they arrived."""
