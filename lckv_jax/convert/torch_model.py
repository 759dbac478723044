"""The PyTorch module written beside an exported checkpoint."""
