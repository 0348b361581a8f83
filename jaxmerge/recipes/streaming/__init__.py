"""Streaming: planned tensors, merged piece by piece in bounded memory by the leaf functions that merge in memory."""
