"""Recurrent sequence models: RNN, GRU and LSTM; classifier, tagger and generator; exact batched search."""
