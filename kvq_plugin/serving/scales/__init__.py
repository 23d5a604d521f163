"""KV scales, from a checkpoint to the buffers that kernels read. In the order it happens:

    keys      a checkpoint's key -> which layer and which scale
    declared  what the checkpoint says about its KV cache, and the dtype that follows
    shapes    a tensor of any published shape -> the form and the heads one rank needs
    load      one loading of a model: which key became what, and which layers lack scales
    method    placeholders on the layers -> reconciled scales -> registered buffers
    config    how all this reaches every attention layer of a model

Only the last two import vLLM; ``kvq inspect`` and ``kvq calibrate`` use the others without.
"""
