"""Text into batches: sources -> tokenizer -> packed records on disk -> batches. preparation.py puts them together."""
