"""What quantizing costs a real model, through the engine, against the same run unquantized."""

from __future__ import annotations

import pytest

from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.output import Target
from kvq_plugin.calibrate.run import calibrate
from kvq_plugin.calibrate.settings import Settings
from kvq_plugin.evaluate import BASELINE, evaluate, load_tokenizer, make_windows
from kvq_plugin.texts import builtin_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WINDOWS = 2
#: Greatest change of perplexity in percent. Over 8 windows of this text, and of a novel:
#: int8_per_token_head +0.11 and +0.16, int8 per channel +0.16 and +0.26, fp8 +1.64 and +1.57
#: (vLLM's own fp8, which truncates: +4.4). Two windows add about as much noise as is allowed here.
BOUNDS = {"int8_per_token_head": 0.3, "int8": 0.6, "fp8": 1.8}


@pytest.fixture(scope="module")
def scores(smollm2, tmp_path_factory):
    tokenizer = load_tokenizer(str(smollm2))
    windows = make_windows(tokenizer, builtin_text(), 24)
    # Calibrated on other windows than those scored.
    calibrated = tmp_path_factory.mktemp("int8") / "model"
    calibrate(Source.find(str(smollm2)), Target(calibrated), Settings(), windows[20:])
    texts = {"reference": windows[:WINDOWS]}
    models = {"int8": calibrated}
    return {
        dtype: evaluate(str(models.get(dtype, smollm2)), dtype, texts).scores["reference"]
        for dtype in (BASELINE, *BOUNDS)
    }


@pytest.mark.parametrize("dtype", BOUNDS)
def test_perplexity_through_the_engine(scores, dtype):
    change, _ = scores[dtype].change(scores[BASELINE])
    assert change < BOUNDS[dtype]
