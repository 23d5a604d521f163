"""The evaluation through transformers: what :func:`kvq_plugin.evaluate.evaluate` shows of an
engine, of a model whose cache is a KVQCache, or transformers' own for ``auto``.

One model serves all caches, in this process. Attention is ``kvq``, which over transformers' own
cache is transformers' own attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvq_plugin import logits
from kvq_plugin.divergence import Divergence
from kvq_plugin.evaluate import (
    BASELINE,
    OWN,
    Evaluation,
    Question,
    Score,
    Tick,
    Window,
    load_tokenizer,
)
from kvq_plugin.hf_cache import NAME, KVQCache
from kvq_plugin.hf_cache.memory import ARGUMENT, held_bytes
from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.serving.scales.declared import (
    declared_scheme,
    put_section,
    quantization_section,
)

#: ``kv_tokens`` of an Evaluation are those of so many bytes: there is no pool to ask.
MEMORY = 1 << 30
#: Questions that are answered at the same time, padded to the longest.
TOGETHER = 16


class TransformersDriver:
    """Evaluates caches of *model*, a directory or hub name, loaded once in its own dtype.

    Raises ValueError for a model whose output layer cannot be told from what comes before it, or
    whose attention cannot be replaced.
    """

    def __init__(self, model: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = checkpoint_folder(model)
        config = _config(folder)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype="auto", attn_implementation=NAME
            )
        except KeyError as error:
            if error.args != (NAME,):
                raise
            # Falcon, GPT-J, GPT-Neo: a class for each attention, looked up by its name.
            raise ValueError(
                f"{config.model_type} models have attention of their own in transformers, which "
                "does not let it be replaced: expected one that takes attn_implementation; use "
                "--driver vllm"
            ) from error
        self.model = loaded.to(device).eval()
        base = self.model.base_model
        if base is self.model or self.model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(self.model).__name__} has no output layer of its own: expected a causal "
                "language model; use --driver vllm"
            )
        self._end = self.model.generation_config.eos_token_id
        # generate fills in what it is not given from here: penalties, as vLLM's driver has none.
        self.model.generation_config = GenerationConfig()
        self._tokenizer = None
        self._hidden: torch.Tensor | None = None
        self._given: torch.Tensor | None = None
        forward = base.forward

        def watched(*args, **kwargs):
            if self._given is not None:
                return BaseModelOutputWithPast(last_hidden_state=self._given)
            output = forward(*args, **kwargs)
            self._hidden = output[0][0]
            return output

        base.forward = watched

    def evaluate(
        self,
        kv_cache_dtype: str,
        texts: Mapping[str, Sequence[Window]],
        *,
        keep: Path | None = None,
        reference: Path | None = None,
        chunk: int | None = None,
        prompts: Sequence[Window] = (),
        length: int = 0,
        questions: Sequence[Question] = (),
        tick: Tick = lambda: None,
    ) -> Evaluation:
        """As :func:`kvq_plugin.evaluate.evaluate`; ``kv_tokens`` are those of a GiB at the length
        of the first window. *chunk*: feed at most so many tokens at once, one sequence at a time;
        otherwise *questions* are answered TOGETHER at a time.

        Raises ValueError for a format that cannot have this model, with the reason.
        """
        generations = [
            row
            for batch in ([[p] for p in prompts] if chunk else _same_lengths(prompts))
            for row in self._greedy(kv_cache_dtype, batch, length)
        ]
        if prompts and OWN not in texts:
            texts = {**texts, OWN: generations}
        answers: list[str] = []
        together = 1 if chunk else TOGETHER
        for at in range(0, len(questions), together):
            answers += self._answers(kv_cache_dtype, questions[at : at + together])
            for _ in questions[at : at + together]:
                tick()
        scores, kv_tokens = {}, None
        for t, (text, windows) in enumerate(texts.items()):
            columns: dict[str, list] = {}
            for i, window in enumerate(windows):
                files = (at and str(at / f"{t}-{i}.safetensors") for at in (reference, keep))
                seen, cache = self._read(kv_cache_dtype, window, chunk, *files)
                for name, values in seen.items():
                    columns.setdefault(name, []).extend(values)
                if kv_tokens is None:
                    kv_tokens = MEMORY * len(window) // held_bytes(cache)
                tick()
            tuples = {name: tuple(values) for name, values in columns.items()}
            divergence = tuples if reference is not None else None
            logprobs = tuples.pop("logprobs")
            scores[text] = Score(logprobs, divergence=divergence and Divergence(**divergence))
        return Evaluation(scores, kv_tokens, tuple(generations), tuple(answers))

    def _cache(self, dtype: str):
        config = self.model.config
        return DynamicCache(config=config) if dtype == BASELINE else KVQCache(config, dtype)

    @torch.inference_mode()
    def _read(self, dtype: str, window: Window, chunk: int | None, reference, keep):
        """Teacher-force *window*; -> its columns (:class:`kvq_plugin.logits.Seen`) and the cache,
        which has all of it."""
        base = None
        if reference is not None:
            base = logits.reference_logits(reference, self._head, self.model.device)
        seen, cache = logits.Seen(window, base, keep), self._cache(dtype)
        ids = torch.tensor([window], device=self.model.device)
        # The last token, which nothing is scored by, comes alone: what the cache then holds is
        # what it holds between two tokens, not what a long prompt needs for a moment.
        for part in (*ids[:, :-1].split(chunk or len(window), 1), ids[:, -1:]):
            found = self.model(input_ids=part, **{ARGUMENT: cache}, use_cache=True).logits[0]
            seen.see(self._hidden, found)
        return seen.result(main=True), cache

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[T, V]`` of *hidden* states ``[T, E]``, as the model makes them."""
        self._given = hidden[None]
        try:
            dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=dummy, use_cache=False).logits[0]
        finally:
            self._given = None

    @torch.inference_mode()
    def _greedy(self, dtype: str, prompts: Sequence[Window], length: int) -> list[Window]:
        """*prompts*, all of one length, each continued to *length* tokens."""
        new = self._continued(dtype, prompts, length - len(prompts[0]), end=None)
        return [prompt + tokens for prompt, tokens in zip(prompts, new, strict=True)]

    @torch.inference_mode()
    def _answers(self, dtype: str, questions: Sequence[Question]) -> list[str]:
        """What is written after each of *questions*, to its end or the limit."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model.config._name_or_path)
        prompts, limits = zip(*questions, strict=True)
        new = self._continued(dtype, prompts, max(limits), self._end)
        return [
            self._tokenizer.decode(tokens[:limit], skip_special_tokens=True)
            for tokens, limit in zip(new, limits, strict=True)
        ]

    def _continued(
        self, dtype: str, prompts: Sequence[Window], new: int, end: int | list[int] | None
    ) -> list[Window]:
        """The up to *new* tokens that follow each prompt at temperature 0; after a row's *end* come
        other rows' paddings."""
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = (torch.tensor(x, device=self.model.device) for x in (padded, mask))
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=end,
            pad_token_id=end[0] if isinstance(end, list) else end or 0,
        )
        done = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=greedy,
            **{ARGUMENT: self._cache(dtype)},
        )
        return done[:, longest:].tolist()


def _same_lengths(prompts: Sequence[Window]) -> list[list[Window]]:
    """All prompts as one batch, or, where they are of several lengths, one by one."""
    if len({len(prompt) for prompt in prompts}) > 1:
        return [[prompt] for prompt in prompts]
    return [list(prompts)] if prompts else []


def _config(folder: Path):
    """The configuration, without a quantization that concerns nothing but the KV cache: KVQCache
    reads its scales, and transformers cannot load all that vLLM can."""
    config = AutoConfig.from_pretrained(folder)
    section = quantization_section(config, folder)
    if section and not section.get("config_groups") and declared_scheme(config) is not None:
        put_section(config, None)
    return config
