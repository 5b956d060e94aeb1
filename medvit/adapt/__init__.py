"""From a pre-trained encoder to a number with a confidence interval: fine-tuning, probes, statistics."""
