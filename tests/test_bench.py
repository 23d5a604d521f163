"""``kvq bench``: what it times is the same attention, and what it writes can be read back."""

from __future__ import annotations

import csv
import re
from contextlib import contextmanager

import pytest
import torch

from kvq_plugin import cli
from kvq_plugin.bench import cases, engine, kernels, output, serve
from kvq_plugin.bench.timing import interleave
from kvq_plugin.formats import FORMATS
from kvq_plugin.servers import ServerError

SHAPES = (
    cases.Shape(2, 300, 4, 2, 64),
    cases.Shape(1, 300, 4, 1, 128, new=70),
)
NAMES = [format.name for format in dict.fromkeys(FORMATS.values())]
#: Relative error of the outputs, from KVFormat.max_error: K's error is damped by the scale of
#: the scores, V's carries over, and vLLM's own bf16 adds 0.3 %.
SLACK = 2.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_candidate_computes_the_same_attention(shape):
    batch = cases._Batch(shape)
    outputs = {}
    for name, candidate in cases._candidates(batch, NAMES).items():
        for sequence in range(shape.batch):
            candidate.store(batch.key, batch.value, batch.slots(sequence))
        batch.out.zero_()
        candidate.attend()
        outputs[name] = batch.out.float()
    expected = outputs[kernels.BASELINE]
    for name in NAMES:
        error = (outputs[name] - expected).norm() / expected.norm()
        assert error < SLACK * FORMATS[name].max_error + 0.005, (name, error)


@pytest.mark.parametrize(
    ("theirs", "ours", "used"),
    [("amx", "amx", "amx"), ("amx", "avx512_bf16", "vec"), ("vec16", "avx2", "vec16")],
)
def test_a_run_without_amx_tiles_is_without_them_on_both_sides(monkeypatch, theirs, ours, used):
    monkeypatch.setattr(cases.compat, "_get_attn_isa", lambda *_: theirs)
    monkeypatch.setattr(cases._native, "isa", lambda: ours)
    assert cases.stock_isa(128, "auto") == used


def test_candidates_take_turns_and_the_first_round_does_not_count():
    calls = []
    timings = interleave({n: (lambda n=n: calls.append(n)) for n in "ab"}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert [len(t.seconds) for t in timings.values()] == [3, 3]


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_rows_are_written_and_drawn(monkeypatch, tmp_path, kind):
    prepare, _, tokens = kernels.KINDS[kind]
    monkeypatch.setitem(kernels.KINDS, kind, (prepare, SHAPES, tokens))
    threads = torch.get_num_threads()
    rows = output.run_kernels(kind, ["int8", "fp8_e4m3"], threads, 2, tmp_path)
    names = ["stock bf16", "stock fp8", "int8", "fp8_e4m3"]
    assert [row.candidate for row in rows] == names * len(SHAPES)
    with (tmp_path / f"{kind}.csv").open() as file:
        assert [line["candidate"] for line in csv.DictReader(file)] == names * len(SHAPES)
    assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{kind}.csv", f"{kind}.png"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    said = "x.csv was not written .*No space left.*another --out"
    with pytest.raises(OSError, match=said), output._replacing(tmp_path / "x.csv") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_take_turns_and_one_that_fails_is_reported(smollm2):
    prompts, memory = [[7] * 40, [9] * 50], 64 << 20
    load = engine.Load(str(smollm2), prompts, bursts=2, eager=True, kv_memory_bytes=memory)
    ours = engine.Engine("ours", "int8_per_token_head")
    seen = []
    stock = engine.Engine("vLLM", "auto", plugin=False)
    steps = engine.decode_steps(load, [stock, ours], seen.append)
    turns = [(name, burst) for burst in (0, 1) for name in ("vLLM", "ours")]
    assert [(s.engine, s.burst) for s in steps] == [t for t in turns for _ in range(7)]
    assert seen[-4:] == ["vLLM", "ours"] * 2 and all(s.milliseconds > 0 for s in steps)
    with pytest.raises(ServerError, match="int8_per_token_head"):  # what it says to use instead
        engine.decode_steps(load, [engine.Engine("static", "int8")])


@pytest.mark.parametrize(("streams", "context"), [(6, 7000), (24, 4000), (1, 1)])
def test_no_stream_ends_before_the_last_burst(streams, context):
    """The first ones decode while the last are prefilled, a step of 4096 tokens after the other."""
    load = engine.Load("m", [[7] * context] * streams, bursts=8, eager=True, kv_memory_bytes=1)
    left, decoded = [context] * streams, [0] * streams
    while any(left):
        room = engine.STEP_TOKENS
        for i in sorted(range(streams), key=lambda i: left[i] > 0):  # the running ones come first
            done = min(left[i] or 1, room)
            room -= done
            if left[i]:
                left[i] -= done
            decoded[i] += done > 0 and not left[i]
    needed = max(decoded) + engine.WARM_UP + load.bursts * engine.BURST
    assert needed <= load.tokens <= needed + 4 and load.length == context + load.tokens


def test_a_step_without_all_streams_is_refused(monkeypatch):
    """A KV cache that does not hold them all decodes some first, and its steps are faster."""

    class Process:
        def send(self, message):
            self.asked = message

        def receive(self):
            return [(0.5, 4), (0.25, decoding)] * (self.asked // 2) if self.asked == 8 else None

    @contextmanager
    def process(*args, **kwargs):
        yield Process()

    monkeypatch.setattr(engine, "engine_process", process)
    load = engine.Load("m", [[7] * 500] * 4, bursts=2, eager=True, kv_memory_bytes=30 << 20)
    decoding = 4
    steps = engine.decode_steps(load, [engine.Engine("vLLM", "auto")])
    assert [s.milliseconds for s in steps] == [250, *[500, 250] * 3] * 2
    decoding = 1
    with pytest.raises(ValueError, match="all 4 streams of 500 tokens, got one with 1.*raise --kv"):
        engine.decode_steps(load, [engine.Engine("vLLM", "auto")])


def test_steps_are_written_and_drawn(monkeypatch, tmp_path):
    engines = engine.beside_stock(["auto", "int4"])
    steps = [
        engine.Step(each.name, burst, 100.0 * i + 10.0 * burst + at)
        for burst in (0, 1)
        for i, each in enumerate(engines)
        for at in range(7)
    ]
    monkeypatch.setattr(engine, "decode_steps", lambda *args, **kwargs: steps)
    load = engine.Load("m", [[7] * 500] * 4, bursts=2, eager=True, kv_memory_bytes=1)
    medians = output.run_engines(load, engines, tmp_path)
    assert medians == {"vLLM auto": 8.0, "vLLM fp8": 108.0, "int4": 208.0}
    with (tmp_path / "engine.csv").open() as file:
        found = [
            (r["engine"], int(r["burst"]), float(r["milliseconds"])) for r in csv.DictReader(file)
        ]
    assert found == [(s.engine, s.burst, s.milliseconds) for s in steps]
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine.csv", "engine.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("attention --dtypes kvq_mixed", "expected formats, of fp8_e4m3.*kvq bench engine"),
        ("store --threads 1000000", "expected at most [0-9]+, the processors"),
        ("generate --dtypes kvq_mixed", "expected formats"),
        ("generate --contexts 460", "take 524 positions, and the model has 512"),
        ("engine --dtypes kvq_mixed --context 20 --streams 1", "kvq_mixed was asked of"),
        ("engine --context 450 --streams 1", "positions, and the model has 512"),
        ("serve --dtypes int8 --input 20 --output 20", "int8 was asked of.*kvq calibrate"),
        ("serve --input 400 --output 112", "take 513 positions, and the model has 512"),
    ],
)
def test_what_cannot_run_is_refused_first(arguments, said, tmp_path, monkeypatch, capfd, smollm2):
    from tiny_models import make

    from kvq_plugin import evaluate

    def start(*args, **kwargs):
        raise AssertionError("an engine was started")

    for name in ("run_kernels", "run_engines", "run_serve", "run_generate"):
        monkeypatch.setattr(output, name, start)
    tokenizer = evaluate.load_tokenizer(str(smollm2))
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda model: tokenizer)
    kind, *rest = arguments.split()
    has_model = kind not in kernels.KINDS
    model = ["--model", str(make(tmp_path, "gqa"))] if has_model else []
    try:
        assert cli.main(["bench", kind, *model, *rest]) == 1
    except SystemExit as error:  # argparse's
        assert error.code == 2
    err = capfd.readouterr().err
    assert re.search(said, err) and "Traceback" not in err, err


def test_generate_measures_every_cache_that_works(tmp_path, capsys):
    from tiny_models import make

    from kvq_plugin.bench import generate

    prompt = [*range(3, 64)]
    chosen = [
        *generate.candidates(["int8_per_token_head", "fp8"]),
        generate.Candidate("broken", lambda config: 1 / 0),
        generate.Candidate("absent", lambda config: None, needs="no_such_package"),
    ]
    model = str(make(tmp_path, "gqa"))
    rows, reasons = generate.run(model, prompt, [20, 60], [1, 3], chosen, 2)
    assert reasons["broken"] == "ZeroDivisionError: division by zero"
    assert reasons["absent"] == "needs no_such_package"
    ours = {"int8_per_token_head", "fp8"}
    for context, batch in ((20, 1), (20, 3), (60, 1), (60, 3)):
        cell = {r.candidate: r for r in rows if (r.context, r.batch) == (context, batch)}
        assert cell.keys() >= {generate.BASELINE, *ours} and not cell.keys() & reasons.keys()
        base = cell[generate.BASELINE]
        # K and V, 2 layers, 2 heads of 32, bf16; up to 3 bursts of 9 tokens, the last one not fed.
        assert base.mebibytes * 2**20 == 2 * 2 * 2 * 32 * 2 * batch * (context + 3 * 9)
        assert base.ratio == base.memory_ratio == 1 and base.milliseconds > 0
    output.write_csv(tmp_path / "generate.csv", rows)
    with (tmp_path / "generate.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for column in output.GENERATE_PLOTS:
        output.write_generate_plot(tmp_path / f"{column}.png", column, rows)
        assert (tmp_path / f"{column}.png").read_bytes().startswith(b"\x89PNG")
    output.print_table(output.Console(), output.generate_table(rows, reasons, 2))
    printed = capsys.readouterr().out
    assert "20 tokens, batch 3" in printed and "absent: not measured" in printed


def test_serving_goes_round_by_round_and_counts_preemptions(monkeypatch, tmp_path, capsys):
    """With servers and vLLM's client pretended; a real client is in test_metrics_server.py."""

    class FakeServer:
        def __init__(self, name, env):
            self.name, self.alone, self.counter = name, env == {"VLLM_PLUGINS": ""}, 5.0

        def kv_tokens(self):
            return 1000

        def metric(self, name):
            assert name == "vllm:num_preemptions_total"
            return self.counter

        def tail(self):
            return "its log"

    @contextmanager
    def fake_serve(model, dtype, *, args, env):
        assert args[args.index("--max-model-len") + 1] == "256"
        started.append(FakeServer(dtype, env))
        yield started[-1]

    started, asked = [], []
    speed = {"auto": 100.0, "fp8": 140.0, "int4": 250.0}

    def fake_client(load, server, seed, out):
        asked.append((server.name, server.alone, seed))
        server.counter += seed
        figures = dict.fromkeys(serve._RESULTS.values(), 7.0)
        return figures | {"completed": complete, "output_throughput": speed[server.name] * seed}

    monkeypatch.setattr(serve, "serve", fake_serve)
    monkeypatch.setattr(serve, "_client", fake_client)
    monkeypatch.setattr(serve, "_warm_up", lambda load, servers: None)
    load = serve.Load("m", 8, 128, 100, rounds=3, eager=True, kv_memory_bytes=128 << 20)
    complete = 8
    rows = output.run_serve(load, engine.beside_stock(["auto", "int4"]), tmp_path)
    one = [("auto", True), ("fp8", True), ("int4", False)]
    assert asked == [(*who, number) for number in (1, 2, 3) for who in one]
    assert [row.preemptions for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    middle = serve.medians(rows)
    assert [row.output_tokens_per_second for row in middle] == [200.0, 280.0, 500.0]
    assert "2.50x" in capsys.readouterr().out
    with (tmp_path / "serve.csv").open() as file:
        assert [line["round"] for line in csv.DictReader(file)] == list("111222333")
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    complete = 7
    with pytest.raises(ServerError, match="vLLM auto: 7 of 8 requests were answered; its log"):
        serve.run(load, engine.beside_stock([]))
