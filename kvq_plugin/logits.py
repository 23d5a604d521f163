"""Inside vLLM's workers: next-token distributions against those of another engine.

vLLM mixes :class:`LogitsWorker` into its worker class (``worker_extension_cls``). It looks at
what the model's ``compute_logits`` is given and answers. The reference's file has the hidden
states that went in, 1.2 KB a token for SmolLM2 where its 49,152 logits are 96 KB: the weights of
the output layer are the same in both engines, so the reference's logits can be had again, bit for
bit, where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvq_plugin.disk import room_for

ROWS = 128  # at a time in float32: 25 MB of SmolLM2's logits


class LogitsWorker:
    """Methods for ``LLM.collective_rpc``; arguments and results are plain values.

    The engine runs a single request between ``kvq_begin`` and ``kvq_end``, which asks for
    ``prompt_logprobs``.
    """

    def kvq_watch(self) -> None:
        """Look at every call of ``compute_logits`` from now on."""
        model = self.get_model()
        self._kvq_compute = compute = model.compute_logits
        self._kvq_window = None

        def watched(hidden_states, *args, **kwargs):
            logits = compute(hidden_states, *args, **kwargs)
            # A single row is the sampler's: the token that follows a chunk or the prompt.
            if self._kvq_window is not None and hidden_states.shape[0] > 1:
                self._kvq_window.see(hidden_states, logits)
            return logits

        model.compute_logits = watched

    @torch.inference_mode()
    def kvq_begin(self, tokens: list[int], reference: str | None, keep: str | None) -> None:
        """The prompt *tokens* comes next: compare it with the file *reference*, and write the
        file *keep*, each where given."""
        logits = None
        if reference is not None:
            logits = reference_logits(reference, self._kvq_compute, self.device)
        self._kvq_window = Seen(tokens, logits, keep)

    @torch.inference_mode()
    def kvq_end(self) -> dict[str, list] | None:
        """What was seen of the window, an entry per token but the first: ``logprobs`` of the
        prompt's tokens and, with a reference, ``kl``, ``tv`` and ``same`` (see Divergence).
        None on ranks that get no logits."""
        window, self._kvq_window = self._kvq_window, None
        return window.result(main=self.rank == 0)


class Seen:
    """One prompt: rows of logits, call by call.

    *tokens* are the prompt's, *reference* the logits ``[T, V]`` to compare with, *keep* the file to
    write for others to compare with; each of the two may be None.
    """

    def __init__(self, tokens: list[int], reference: torch.Tensor | None, keep: str | None):
        self.tokens = torch.tensor(tokens)
        self.reference = reference
        self.keep = keep
        self.calls: list[torch.Tensor] = []
        self.columns: dict[str, list] = {}
        self.row = 0

    def see(self, hidden_states: torch.Tensor, logits: torch.Tensor | None) -> None:
        """The next rows: what the output layer was given ``[T, E]``, and its answer ``[T, V]``."""
        if self.keep is not None:
            self.calls.append(hidden_states.detach().cpu().contiguous().clone())
        if logits is None:
            return
        # The last token has nothing to be scored against; some versions compute its row too.
        scored = logits[: len(self.tokens) - 1 - self.row]
        for rows in scored.split(ROWS):
            begin, self.row = self.row, self.row + len(rows)
            base = None if self.reference is None else self.reference[begin : self.row]
            targets = self.tokens[begin + 1 : self.row + 1].to(rows.device)
            for name, values in _compared(rows, targets, base):
                self.columns.setdefault(name, []).extend(values.tolist())

    def result(self, main: bool) -> dict[str, list] | None:
        """Columns by name, None but on the *main* rank, which writes the file."""
        if self.keep is not None and main:
            sizes = torch.tensor([len(rows) for rows in self.calls])
            hidden = torch.cat(self.calls) if self.calls else torch.empty(0)
            what = f"what KL divergences start from ({hidden.nbytes:,} bytes a window)"
            remedy = "name a folder with room in TMPDIR, or pass --no-divergence"
            with room_for(f"{what} at {self.keep}", remedy):
                save_file({"hidden": hidden, "sizes": sizes}, self.keep)
        return self.columns if main else None


def reference_logits(file: str, compute: Callable, device: Any) -> torch.Tensor | None:
    """The logits of the engine that wrote *file*, by calls of the same sizes; None where *compute*,
    hidden states to logits, gives none."""
    stored = load_file(file)
    hidden = stored["hidden"].to(device).split(stored["sizes"].tolist())
    rows = [compute(part) for part in hidden]
    return None if any(part is None for part in rows) else torch.cat(rows)


def _compared(
    logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Columns by name: of *logits* ``[T, V]``, against *base* ``[T, V]`` where there is one."""
    q = logits.float().log_softmax(-1)
    yield "logprobs", q.gather(-1, targets[:, None])[:, 0]
    if base is None or base.shape != q.shape:
        return  # evaluate.py counts the entries
    yield from divergence_rows(base, q)


def divergence_rows(base: torch.Tensor, q: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """``kl``, ``tv`` and ``same`` of each row: *base* are logits ``[T, V]``, *q*
    log-probabilities ``[T, V]`` in float32."""
    p = base.float().log_softmax(-1)
    p_mass, q_mass, d = p.exp(), q.exp(), q - p
    # sum(p (e^d - 1 - d)) is sum(-p d), as both sum to 1. Its terms are positive, and rounding of
    # the normalizers, 5e-7 nats otherwise, cancels in each. Far apart e^d would overflow.
    near, far = p_mass * (torch.expm1(d) - d), q_mass - p_mass * (1 + d)
    terms = torch.where(d < 1, near, far)
    yield "kl", torch.where(p_mass > 0, terms, q_mass).sum(-1)
    yield "tv", (p_mass - q_mass).abs().sum(-1) / 2
    yield "same", p.argmax(-1) == q.argmax(-1)
