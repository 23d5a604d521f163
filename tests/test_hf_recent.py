"""KVQCache of formats with recent rows: what each query reads, whatever happened to the batch."""

from __future__ import annotations

import random

import pytest
import torch
from dequantized import CACHE
from exact_model import exact_products
from recent_cache import RecentCache
from test_hf_cache import CONFIG, HEADS, LAYERS, SIZE, feed
from test_hf_generate import NEW, generate, load, logits, models, prompts
from transformers import DynamicCache

from kvq_plugin import reference
from kvq_plugin.formats import GROUP, SERVED
from kvq_plugin.hf_cache import KVQCache, KVQLayer
from kvq_plugin.hf_cache.table import SPARE, WIDE
from kvq_plugin.layout import PageLayout

assert models and load  # the fixture, and what it calls
NAMES = [name for name, format in SERVED.items() if format.recent is not None]
BLOCK = 64


class Raw(DynamicCache):
    """transformers' own cache; ``layers`` hold what KVQCache's must dequantize to."""

    def __init__(self, name: str) -> None:
        super().__init__(config=CONFIG)
        self.oracle = RecentCache(CONFIG, name, BLOCK)

    def read(self, layer: int):
        """K and V as the newest query reads them."""
        return self.oracle.read(self.layers[layer].keys, self.layers[layer].values)


def assert_reads(ours: KVQCache, raw: Raw) -> None:
    assert ours.get_seq_length() == raw.get_seq_length()
    for i, layer in enumerate(ours.layers):
        for got, expected in zip(layer.dequantize(), raw.read(i), strict=True):
            assert torch.equal(got, expected)


def pair(name: str):
    return KVQCache(CONFIG, name, block_size=BLOCK), Raw(name)


@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_what_queries_read(name):
    """In chunks and token by token, over groups that are sealed and pages that are full."""
    torch.manual_seed(0)
    caches = pair(name)
    for tokens in (37, 1, 30, 1, 200, 1, 16, 1, 1, 1, 900, 3):
        feed(caches, 2, tokens)
        assert_reads(*caches)


@pytest.mark.parametrize("name", NAMES)
def test_any_order_of_changes(name):
    """Random changes of the batch, each against DynamicCache's own."""
    rng = random.Random(1)
    torch.manual_seed(1)
    for _ in range(4):
        caches, batch, lowest = pair(name), rng.randint(1, 3), 1
        for _ in range(25):
            length = caches[0].get_seq_length()
            change = rng.choice(["feed", "feed", "token", "reorder", "crop", "repeat", "select"])
            if change in ("feed", "token") or not length:
                lowest = max(lowest, length - SPARE)
                feed(caches, batch, 1 if change == "token" else rng.randint(1, 70))
            elif change == "reorder":
                beams = torch.tensor([rng.randrange(batch) for _ in range(batch)])
                for cache in caches:
                    cache.reorder_cache(beams)
            elif change == "crop":
                target = rng.randint(lowest, length)
                for cache in caches:
                    cache.crop(target - length)
            elif change == "repeat" and batch < 4:
                batch *= 2
                for cache in caches:
                    cache.batch_repeat_interleave(2)
            elif change == "select":
                chosen = torch.tensor(sorted(rng.sample(range(batch), rng.randint(1, batch))))
                batch = len(chosen)
                for cache in caches:
                    cache.batch_select_indices(chosen)
            if rng.random() < 0.5:
                assert_reads(*caches)
        assert_reads(*caches)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_taken_back_and_given_again_is_the_same_bytes(name):
    """Groups that were sealed with other tokens are sealed again."""
    torch.manual_seed(2)
    key, value = torch.randn(2, 1, HEADS, 200, SIZE).unbind(0)
    caches = []
    for detours in ((), ((100, 20), (160, 40))):
        cache = KVQCache(CONFIG, name, block_size=BLOCK)
        at = 0
        for end, wrong in (*detours, (200, 0)):
            for i in range(LAYERS):
                cache.update(key[:, :, at:end], value[:, :, at:end], i)
            if wrong:
                feed([cache], 1, wrong)
                cache.crop(-wrong)
            at = end
        for layer in cache.layers:
            layer.commit()
        caches.append(cache)
    for mine, other in zip(*(cache.layers for cache in caches), strict=True):
        for a, b in zip(mine.dequantize(), other.dequantize(), strict=True):
            assert torch.equal(a, b)
        written, others = (
            layer.pool[layer.table.pages.table[0, :3].long()].flatten(2) for layer in (mine, other)
        )
        # The three whole pages: their ends are padding that nobody writes.
        size = PageLayout(mine.format, SIZE, BLOCK).first + mine.format.first_row_bytes(SIZE)
        assert torch.equal(written[..., :size], others[..., :size])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_store_that_vllm_calls(name):
    """Where vLLM has its recent rows in blocks of 64, for slots that follow each other."""
    torch.manual_seed(0)
    cache, _ = pair(name)
    key, value = torch.randn(2, 1, HEADS, 3 * BLOCK, SIZE).unbind(0)
    for begin, end in ((0, 20), (20, 21), (21, 3 * BLOCK)):
        cache.update(key[:, :, begin:end], value[:, :, begin:end], 0)
    layer = cache.layers[0]
    layer.commit()
    pages = torch.zeros_like(layer.pool)
    recent = torch.zeros(3, HEADS, 64, cache.format.recent.bytes_per_token(SIZE), dtype=torch.uint8)
    rows, slots = [x[0].transpose(0, 1) for x in (key, value)], torch.arange(3 * BLOCK)
    more = {"recent_cache": recent, "recent_slot_mapping": slots}
    reference.store(*rows, pages, slots, cache.format, **more)
    size = PageLayout(cache.format, SIZE, BLOCK).first + cache.format.first_row_bytes(SIZE)
    mine = layer.pool[layer.table.pages.table[0].long()].flatten(2)
    assert torch.equal(mine[..., :size], pages.flatten(2)[..., :size])


def test_taking_back_more_is_refused():
    cache, _ = pair("int4")
    feed([cache], 1, 300)
    cache.crop(-100)  # of one pass
    feed([cache], 1, 100)
    feed([cache], 1, 1)
    for layer in cache.layers:
        layer.commit()
    with pytest.raises(ValueError, match="crop to 201 tokens: in int4 up to 32 tokens"):
        cache.crop(-100)
    assert cache.get_seq_length() == 301
    cache.crop(-1 - SPARE)
    feed([cache], 1, 1600)
    for layer in cache.layers:
        layer.attend(torch.zeros(1, HEADS, 1600, SIZE), layer.commit(), 1.0)
    cache.crop(-WIDE)  # of one long pass
    with pytest.raises(ValueError, match="up to 256 of the last forward pass"):
        cache.crop(-SPARE)
    cache.crop(-cache.get_seq_length())  # all of them: nothing is read any more
    raw = Raw("int4")
    torch.manual_seed(3)
    feed([cache, raw], 1, 90)
    assert_reads(cache, raw)


def test_recent_rows_are_few():
    """Once the prompt is in, 96 rows of int8 a sequence; and what was counted is what is there."""
    cache, _ = pair("int4")
    feed([cache], 2, 1000)
    row = 2 * SIZE + 8
    for _ in range(70):
        feed([cache], 2, 1)
        for layer in cache.layers:
            layer.commit()
        held = [layer.recent.numel() for layer in cache.layers]
        assert max(held) <= 2 * HEADS * (2 * GROUP + SPARE) * row
    pages = -(-1070 // BLOCK) * BLOCK * cache.format.bytes_per_token(SIZE, BLOCK)
    assert cache.nbytes == sum(held) + LAYERS * 2 * HEADS * pages


def test_offload_and_other_protocol():
    torch.manual_seed(0)
    caches = pair("k3v2")
    feed(caches, 2, 50)
    for layer in caches[0].layers:
        layer.offload()
    feed(caches, 2, 20)
    assert_reads(*caches)
    for cache in caches:
        cache.reset()
    assert caches[0].nbytes == 0
    feed(caches, 1, 70)
    assert_reads(*caches)


# --- models ----------------------------------------------------------------------------


def oracle(model, name, inputs):
    """A cache that has read all of the prompts but the last token, one by one."""
    cache = RecentCache(model.config, name, BLOCK)
    mask = inputs["attention_mask"]
    with torch.inference_mode():
        for at in range(mask.shape[1] - 1):
            cache.mask = mask[:, : at + 1].bool()
            positions = (mask[:, : at + 1].cumsum(1) - 1).clamp(min=0)[:, -1:]
            model(
                input_ids=inputs["input_ids"][:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=positions,
                **{CACHE: cache},
            )
    cache.mask = mask.bool()
    return cache


def assert_same_tokens(ours, expected, scores, slack):
    """But where a token led by less than what one more code makes up for."""
    start = expected.shape[1] - len(scores)
    for row, (a, b) in enumerate(zip(ours, expected, strict=True)):
        differ = (a != b).nonzero()
        if len(differ):
            first, second = scores[int(differ[0]) - start][row].topk(2).values
            assert first - second < slack


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("int4", "gqa"), ("int4", "window_and_full_layers"), ("int4", "sinks"),
        ("int4", "softcap"), ("k3v2", "window_and_full_layers"),
    ],
)  # fmt: skip
def test_same_tokens(models, feature, name):
    """Left padding, windows beside full layers, sinks, softcap: greedy tokens are those of
    transformers' attention over its own cache of dequantized values."""
    inputs = prompts((5, 100, 66))
    details = {"output_scores": True, "return_dict_in_generate": True}
    model = models(feature, "eager")
    expected = generate(model, oracle(model, name, inputs), inputs, **details)
    model = models(feature)
    ours = generate(model, KVQCache(model.config, name, block_size=BLOCK), inputs)
    assert_same_tokens(ours, expected.sequences, expected.scores, 0.3)
    assert (ours == expected.sequences)[:, -NEW:].float().mean() > 0.6


@pytest.mark.parametrize("feature", ["gqa", "kv_sharing"])
def test_beams(models, feature):
    """Which share their pages, until each writes into one."""
    inputs = prompts((70,))
    model = models(feature, "eager")
    cache = oracle(model, "int4", inputs)
    cache.batch_repeat_interleave(3)
    expected = generate(model, cache, inputs, num_beams=3)
    model = models(feature)
    cache = KVQCache(model.config, "int4", block_size=BLOCK)
    assert torch.equal(generate(model, cache, inputs, num_beams=3), expected)


def test_assisted_decoding(models):
    """Wrong drafts leave no trace: the tokens are those without drafts."""
    assistant = models("mqa", "sdpa")
    assistant.generation_config.update(
        num_assistant_tokens=5,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    inputs = prompts((60,))
    model = models("gqa")
    alone, drafted = (
        generate(model, KVQCache(model.config, "int4"), inputs, max_new_tokens=60, **more)
        for more in ({}, {"assistant_model": assistant})
    )
    assert torch.equal(alone, drafted)


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_or_many(models, monkeypatch, name):
    """To the last bit, where products do not depend on the batch."""
    exact_products(monkeypatch)
    inputs, model = prompts((130, 97)), models("gqa")
    chunks = ((None,), (40, 89, 1), (1,) * 130)
    whole, *others = (
        logits(model, KVQCache(model.config, name, block_size=BLOCK), inputs, c) for c in chunks
    )
    real = inputs["attention_mask"].bool()
    for other in others:
        assert torch.equal(whole[real], other[real])


@pytest.mark.parametrize("feature", ["gqa", "kv_sharing"])
def test_a_long_prompts_rows_are_one_layers_at_a_time(models, monkeypatch, feature):
    """In one pass or in chunks: the same tokens. Where layers share K and V, chunks bound it."""
    model, inputs = models(feature), prompts((1500, 1430))
    attend, answers, peaks = KVQLayer.attend, [], []
    for chunk in (None, 64):
        cache, held = KVQCache(model.config, "int4", block_size=BLOCK), []
        layers = [layer for layer in cache.layers if isinstance(layer, KVQLayer)]

        def counted(self, *args, held=held, layers=layers, **options):
            held.append([layer.recent.shape[0] for layer in layers if layer.recent is not None])
            return attend(self, *args, **options)

        monkeypatch.setattr(KVQLayer, "attend", counted)
        answers.append(generate(model, cache, inputs, prefill_chunk_size=chunk))
        peaks.append(max(map(sum, held)))
    assert torch.equal(*answers)
    # Blocks: of all rows; of WIDE and a query's, to the longest sequence's end; of a chunk.
    whole, kept, chunks = 47 + 45, 2 * ((WIDE + 2 * GROUP + 70) // GROUP + 1), 2 * 6
    layers = len(layers)
    assert peaks[0] <= (layers * whole if feature == "kv_sharing" else whole + (layers - 1) * kept)
    assert peaks[0] >= whole and peaks[1] <= layers * chunks


@pytest.mark.parametrize("name", NAMES)
def test_short_sequences_keep_no_more_rows_than_they_have(models, name):
    """Beside a long one, of which each had as many."""
    model, inputs = models("gqa"), prompts((1500, 40, 40, 40))
    cache = KVQCache(model.config, name, block_size=BLOCK)
    table = cache.layers[0].table
    generate(model, cache, inputs)
    assert table.recent.count <= 4 * 4  # of GROUP rows; there were 48 for each
    cache.batch_select_indices([1, 0])
    cache.batch_repeat_interleave(3)
    assert table.recent.count <= 4 * 4
    assert [layer.dequantize()[0].shape[0] for layer in cache.layers] == [6] * LAYERS


@pytest.mark.parametrize("name", [*NAMES, "int8_per_token_head"])
@pytest.mark.parametrize("chunk", [7, 16, 32])
def test_chunks_of_padding_alone(models, name, chunk):
    """As padding="max_length" gives; a sequence that has no token yet has no block either."""
    model, inputs = models("gqa"), prompts((5, 20))
    wide = {key: torch.nn.functional.pad(x, (44, 0)) for key, x in inputs.items()}
    answers = [
        generate(model, KVQCache(model.config, name), of, **options)[:, -NEW:]
        for of, options in ((inputs, {}), (wide, {"prefill_chunk_size": chunk}))
    ]
    assert torch.equal(*answers)


def test_layers_that_share_unannounced_are_refused():
    """Whose rows of a long prompt are gone when they are asked for again."""
    cache, _ = pair("int4")
    feed([cache], 1, 1500)
    layer = cache.layers[0]
    step, query = layer.commit(), torch.randn(1, 2 * HEADS, 1500, SIZE)
    layer.attend(query, step, 0.1)
    with pytest.raises(ValueError, match="twice in one forward pass.*prefill_chunk_size=256"):
        layer.attend(query, step, 0.1)


def test_other_attention_is_refused(models):
    model = models("gqa", "sdpa")
    with pytest.raises(ValueError, match='attention other than.*attn_implementation="kvq"'):
        generate(model, KVQCache(model.config, "int4"))
    model = models("gqa")
    inputs = prompts((30, 30))
    inputs["attention_mask"] = torch.ones(2, 1, 30, 30, dtype=torch.bool).triu()
    with pytest.raises(ValueError, match="mask that is more than padding cannot read int4"):
        position = {"position_ids": torch.arange(30).expand(2, 30)}
        logits(model, KVQCache(model.config, "int4"), inputs, **position)
    with pytest.raises(ValueError, match="block_size=48: expected a multiple of 32"):
        KVQCache(CONFIG, "int4", block_size=48)
