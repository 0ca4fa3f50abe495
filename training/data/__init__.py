"""Rows from anywhere, examples of token ids, batches of tensors: in this order, each in its own file."""
