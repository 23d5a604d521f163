"""transformers' ``generate`` on a quantized cache: the pages that vLLM's layers keep.

    from kvq_plugin.hf_cache import KVQCache

    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="kvq")
    model.generate(**inputs, past_key_values=KVQCache(model.config, "int8_per_token_head"))

(from transformers 5.24 on, ``cache=`` instead of ``past_key_values=``). Importing this package
registers the attention implementation ``kvq``. In the order in which a token meets them:

    cache      KVQCache: which layers are ours, their format and scales
    layer      KVQLayer, one layer's pages
    paged      what its ``update`` returns for K and V
    table      where each token of each sequence lies, for all layers alike; blocks: which are whose
    attention  ``attn_implementation="kvq"``: stores the new tokens and attends to the codes
    options    what the options of transformers' QuantizedCache are here
    scales     static scales, from a checkpoint or a mapping
    memory     what a cache holds, ours or transformers' own
"""

from kvq_plugin.hf_cache.attention import NAME, register
from kvq_plugin.hf_cache.cache import KVQCache
from kvq_plugin.hf_cache.layer import KVQLayer

__all__ = ["KVQCache", "KVQLayer", "NAME", "VERSIONS"]

#: transformers from and to; both ends are tested.
VERSIONS = ("5.19.0", "5.24.0")

register()
