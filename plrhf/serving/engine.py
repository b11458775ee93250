"""The engine: one thread that owns a model, and writes for many people in one batch."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

from plrhf.backbone.row_options import RowSampler, Sampling, row_options
from plrhf.models.base import PersonalModule
from plrhf.models.generation import batches_by_length, left_padded, text_ends, write_batch
from plrhf.models.live_batch import LiveBatch, can_join
from plrhf.serving.text_stream import TextStream

T = TypeVar("T")

JOINING_SHARE = 0.25
"""Answers that wait join at once if they are so large a share of those being written."""


class Busy(Exception):
    """So many answers wait that no further one is taken."""


@dataclass(eq=False)
class Answer:
    """One text to be written, and what was written so far.

    Attributes:
        prompt: token ids. vector: of the person, [user_dim]. max_tokens: largest number of new tokens.
        stop: sequences that end the text. tell: gets each piece of text in the engine's thread.
        done: gets "stop" or "length" when the text has ended.
        cancelled: set it from any thread to end the text early.
        asked: when it was asked for, by the monotonic clock.
    """

    prompt: Sequence[int]
    vector: Tensor
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()
    tell: Callable[[str], None] = lambda piece: None
    done: Future[str] = field(default_factory=Future)
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)
    text: str = ""
    n_tokens: int = 0


class _Writing:
    """An answer while it is written: hears its tokens until it ends.

    Attributes:
        numbers: random numbers for sampling. token: the newest one.
    """

    def __init__(self, answer: Answer, stream: TextStream, ends: set[int]) -> None:
        self.answer, self.stream, self.ends = answer, stream, ends
        self.numbers, self.token = Random(answer.sampling.seed), 0

    def hear(self, token: int) -> bool:
        """Add a token; return whether the answer has ended."""
        answer = self.answer
        if answer.done.done():
            return True
        self.token = token
        answer.n_tokens += 1
        reason = None
        if token in self.ends or answer.cancelled:
            reason = "stop"
        else:
            self._tell(self.stream.push(token))
            if self.stream.stopped:
                reason = "stop"
            elif answer.n_tokens >= answer.max_tokens:
                reason = "length"
        if reason is not None:
            self._tell(self.stream.finish())
            answer.done.set_result(reason)
        return reason is not None

    def _tell(self, piece: str) -> None:
        if piece != "":
            self.answer.text += piece
            self.answer.tell(piece)


class Engine:
    """Runs all computations with one model in one thread.

    Answers join the batch that is being written, and leave it, between two tokens. While few wait, they
    wait for others up to `max_wait`, as reading several prompts at once costs little more than one. Other
    computations run between two tokens, too. Of models that cannot let texts join (see `can_join`), a batch
    is written from beginning to end.

    Args:
        model: in eval mode, with its tokenizer. batch_size: answers written at once.
        max_wait: how long an answer waits for others before it joins, in seconds.
        max_waiting: answers that may wait before `Busy` is raised.

    Attributes:
        n_waiting: answers that wait. n_written: tokens written so far.
    """

    def __init__(
        self, model: PersonalModule, *, batch_size: int, max_wait: float, max_waiting: int
    ) -> None:
        self.model, self.batch_size, self.max_wait = model, batch_size, max_wait
        self.max_waiting, self.n_waiting, self.n_written = max_waiting, 0, 0
        self.ends: set[int] = set(text_ends(model.backbone, model.tokenizer))
        self.batch: LiveBatch[_Writing] | None = LiveBatch(model) if can_join(model) else None
        self.jobs: queue.SimpleQueue[Answer | Callable[[], None] | None] = queue.SimpleQueue()
        self.waiting: deque[Answer] = deque()
        self.lock = threading.Lock()
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="plrhf engine", daemon=True)
        self.thread.start()

    def compute(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call a function in the engine's thread and wait for what it returns."""
        done: Future[T] = Future()

        def job() -> None:
            try:
                done.set_result(function(*arguments, **named))
            except BaseException as error:  # it is raised where it was asked for
                done.set_exception(error)

        self._put([job])
        return done.result()

    def write(self, answers: Sequence[Answer]) -> None:
        """Let answers be written; their `done` tells when.

        Raises:
            Busy: too many wait already.
        """
        with self.lock:
            if self.n_waiting + len(answers) > self.max_waiting:
                raise Busy
            self.n_waiting += len(answers)
        self._put(answers)

    def close(self) -> None:
        """End after all that was asked for is done."""
        with self.lock:
            self.closed = True
            self.jobs.put(None)
        self.thread.join()

    def _put(self, jobs: Sequence[Answer | Callable[[], None]]) -> None:
        with self.lock:
            if self.closed:
                raise Busy
            for job in jobs:
                self.jobs.put(job)

    @property
    def n_live(self) -> int:
        """Number of answers that are being written."""
        return 0 if self.batch is None else len(self.batch)

    def _run(self) -> None:
        ending = False
        while not ending or self.n_live + len(self.waiting) > 0:
            ending = self._take_jobs() or ending
            if self._should_join():
                self._begin()
            if self.batch is not None and len(self.batch) > 0:
                self._guarded(self._step, self.batch)

    def _take_jobs(self) -> bool:
        """Run other computations and collect answers; wait if there is nothing else to do.

        Returns:
            whether no job comes after these.
        """
        idle = self.n_live + len(self.waiting) == 0
        while True:
            try:
                job = self.jobs.get(block=idle)
            except queue.Empty:
                return False
            idle = False
            if job is None:
                return True
            if isinstance(job, Answer):
                self.waiting.append(job)
            else:
                job()

    def _should_join(self) -> bool:
        n_live, n_waiting = self.n_live, len(self.waiting)
        if n_waiting == 0 or n_live == self.batch_size:
            return False
        is_enough = n_waiting >= n_live * JOINING_SHARE or n_live + n_waiting >= self.batch_size
        return is_enough or time.monotonic() - self.waiting[0].asked >= self.max_wait

    def _begin(self) -> None:
        """Begin to write answers that wait, as many as the batch has room for."""
        n = min(len(self.waiting), self.batch_size - self.n_live)
        answers = [self.waiting.popleft() for _ in range(n)]
        with self.lock:
            self.n_waiting -= n
        rows = [
            _Writing(one, TextStream(self.model.tokenizer, one.stop), self.ends)
            for one in answers
            if not self._is_cancelled(one)
        ]
        if len(rows) == 0:
            return
        if self.batch is not None:
            self._guarded(self._join, self.batch, rows, learn=rows)
            return
        prompts = [row.answer.prompt for row in rows]
        unpadded = self.model.backbone.layout == "two_rows"  # a state would see padding
        for places in batches_by_length(prompts, batch_size=len(rows), unpadded=unpadded):
            own = [rows[place] for place in places]
            self._guarded(self._write_whole, own, learn=own)

    def _is_cancelled(self, answer: Answer) -> bool:
        if answer.cancelled:
            answer.done.set_result("stop")
        return answer.cancelled

    def _guarded(
        self, function: Callable[..., None], *arguments: Any, learn: Sequence[_Writing] = ()
    ) -> None:
        """Call a function that writes. If it fails, so do answers being written, and those of `learn`."""
        try:
            with torch.no_grad(), self.model.autocast():
                function(*arguments)
        except BaseException as error:
            live = [] if self.batch is None else self.batch.rows
            for row in (*learn, *live):
                if row is not None and not row.answer.done.done():
                    row.answer.done.set_exception(error)
            if self.batch is not None:
                self.batch.clear()

    def _join(self, batch: LiveBatch[_Writing], rows: list[_Writing]) -> None:
        """Let answers join the batch, and write their first tokens."""
        prompts = [row.answer.prompt for row in rows]
        logits = batch.join(rows, prompts, self._vectors(rows))
        self._hear(batch, rows, logits)

    def _step(self, batch: LiveBatch[_Writing]) -> None:
        """Write one token of each answer."""
        batch.make_room()
        tokens = torch.tensor([0 if row is None else row.token for row in batch.rows])
        logits = batch.step(tokens.to(self.model.device))
        live = [slot for slot, row in enumerate(batch.rows) if row is not None]
        rows = [row for row in batch.rows if row is not None]
        self._hear(batch, rows, logits[live] if len(live) < len(logits) else logits)

    def _hear(self, batch: LiveBatch[_Writing], rows: list[_Writing], logits: Tensor) -> None:
        """Choose the next token of each row from its logits; rows that have ended leave."""
        samplings, numbers = [row.answer.sampling for row in rows], [row.numbers for row in rows]
        tokens = RowSampler(samplings, numbers, logits.device).choose(logits).tolist()
        self.n_written += len(tokens)
        ended = [row for row, token in zip(rows, tokens, strict=True) if row.hear(token)]
        batch.leave(ended)

    def _write_whole(self, rows: list[_Writing]) -> None:
        """Write answers in a batch of their own from beginning to end."""
        model = self.model

        def hear(tokens: list[int]) -> list[bool]:
            self.n_written += len(tokens)
            return [row.hear(token) for row, token in zip(rows, tokens, strict=True)]

        answers = [row.answer for row in rows]
        input_ids, mask = left_padded([one.prompt for one in answers])
        write_batch(
            model,
            model.tokenizer,
            input_ids.to(model.device),
            mask.to(model.device),
            self._vectors(rows),
            max_new_tokens=max(one.max_tokens for one in answers),
            of_rows=row_options([one.sampling for one in answers], hear, model.device),
        )

    def _vectors(self, rows: Sequence[_Writing]) -> Tensor:
        return torch.stack([row.answer.vector for row in rows]).to(self.model.device)
