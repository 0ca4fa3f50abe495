"""From data to a model directory: recipes, data, the loop, checkpoints, metrics, reports. Imports seqmodels alone."""
