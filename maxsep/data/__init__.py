"""Text into batches: sources -> tokenizer -> packed records on disk -> batches. `maxsep.prepare` puts them together."""
