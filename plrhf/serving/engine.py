"""The engine: one thread that owns a model, and writes for many people in one batch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from plrhf.backbone.row_options import Sampling, row_options
from plrhf.models.base import PersonalModule
from plrhf.models.generation import batches_by_length, left_padded, text_ends, write_batch
from plrhf.serving.text_stream import TextStream

T = TypeVar("T")

MOST_WAITS = 5


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
    """

    prompt: Sequence[int]
    vector: Tensor
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()
    tell: Callable[[str], None] = lambda piece: None
    done: Future[str] = field(default_factory=Future)
    cancelled: bool = False
    text: str = ""
    n_tokens: int = 0


class _Writing:
    """An answer while it is written: hears its tokens until it ends."""

    def __init__(self, answer: Answer, stream: TextStream, ends: set[int]) -> None:
        self.answer, self.stream, self.ends = answer, stream, ends

    def hear(self, token: int) -> bool:
        """Add a token; return whether the answer has ended."""
        answer = self.answer
        if answer.done.done():
            return True
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

    A batch waits for further answers until none has come for `max_wait`, but not more than `MOST_WAITS`
    times as long. It is written together, each answer with its person's vector and sampling options. An
    answer ends on its own; the next batch begins when all of a batch have ended. Other computations run
    between batches.

    Args:
        model: in eval mode, with its tokenizer. batch_size: answers written at once.
        max_wait: how long a batch waits for one more answer, in seconds.
        max_waiting: answers that may wait before `Busy` is raised.

    Attributes:
        n_waiting: answers that wait. n_written: tokens written so far, those after an end included.
    """

    def __init__(
        self, model: PersonalModule, *, batch_size: int, max_wait: float, max_waiting: int
    ) -> None:
        self.model, self.batch_size, self.max_wait = model, batch_size, max_wait
        self.max_waiting, self.n_waiting, self.n_written = max_waiting, 0, 0
        self.ends: set[int] = set(text_ends(model.backbone, model.tokenizer))
        self.jobs: queue.SimpleQueue[Answer | Callable[[], None] | None] = queue.SimpleQueue()
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

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            if isinstance(job, Answer):
                self._write(self._gather(job))
            else:
                job()

    def _gather(self, first: Answer) -> list[Answer]:
        """Return the answers of the next batch, and run other jobs that come in between."""
        found, last = [first], time.monotonic() + MOST_WAITS * self.max_wait
        while len(found) < self.batch_size:
            try:
                job = self.jobs.get(timeout=max(0.0, min(self.max_wait, last - time.monotonic())))
            except queue.Empty:
                break
            if job is None:
                self.jobs.put(None)  # it was the last one
                break
            if isinstance(job, Answer):
                found.append(job)
            else:
                job()
        with self.lock:
            self.n_waiting -= len(found)
        return [answer for answer in found if not self._is_cancelled(answer)]

    def _is_cancelled(self, answer: Answer) -> bool:
        if answer.cancelled:
            answer.done.set_result("stop")
        return answer.cancelled

    def _write(self, answers: list[Answer]) -> None:
        """Write answers, in one batch if the backbone can pad prompts."""
        unpadded = self.model.backbone.layout == "two_rows"
        prompts = [answer.prompt for answer in answers]
        size = self.batch_size
        for places in batches_by_length(prompts, batch_size=size, unpadded=unpadded):
            batch = [answers[place] for place in places]
            try:
                self._write_batch(batch)
            except BaseException as error:  # each of the batch learns of it
                for answer in batch:
                    if not answer.done.done():
                        answer.done.set_exception(error)

    @torch.no_grad()
    def _write_batch(self, batch: list[Answer]) -> None:
        model, device = self.model, self.model.device
        rows = [_Writing(one, TextStream(model.tokenizer, one.stop), self.ends) for one in batch]

        def hear(tokens: list[int]) -> list[bool]:
            self.n_written += len(tokens)
            return [row.hear(token) for row, token in zip(rows, tokens, strict=True)]

        input_ids, mask = left_padded([one.prompt for one in batch])
        user = torch.stack([one.vector for one in batch]).to(device)
        with model.autocast():
            write_batch(
                model,
                model.tokenizer,
                input_ids.to(device),
                mask.to(device),
                user,
                max_new_tokens=max(one.max_tokens for one in batch),
                of_rows=row_options([one.sampling for one in batch], hear, device),
            )
