"""KV scales, from a checkpoint to the buffers the kernels read, in the order it happens."""
