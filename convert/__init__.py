"""PyTorch checkpoints to jdit and back: readers, tables, streaming."""
