"""Model directories in Hugging Face's layout: written, read, and their tokenizers."""
