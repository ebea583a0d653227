"""Models of Hugging Face's transformers, written and read; that library itself is not needed."""
