"""Judges: vision-language models behind an OpenAI-compatible server that look at finished pictures. No gradient."""
