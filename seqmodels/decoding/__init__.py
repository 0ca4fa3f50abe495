"""How a generator speaks: the options, the rules on logits, the search on tensors, and the continuous batch."""
