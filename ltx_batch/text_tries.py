"""The attempts of texts, by the policy that rows have: what passes is tried again, and one bad text stops no other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from ltx_batch.errors import LtxBatchError, RunStopped
from ltx_batch.job import AttemptPolicy
from ltx_batch.text_worker import Encoded


class TextTries:
    """What is to be encoded: `batches`, and whatever of them is to be tried again.

    A batch that raises is tried again text by text; a text that raised by itself `max_attempts` times has failed. Where
    `max_worker_deaths` texts in a row raise on one worker, or an error is no passing one, it is not the text's fault.
    """

    def __init__(self, batches: Iterator[Sequence[str]], policy: AttemptPolicy) -> None:
        self._batches, self._policy = batches, policy
        self._again: list[Sequence[str]] = []
        self._attempts: Counter[str] = Counter()
        self._raised: defaultdict[int, set[str]] = defaultdict(set)  # by worker, since it last encoded something

    def next(self) -> Sequence[str] | None:
        """A batch for a worker; an empty one where there is none yet, None where there is none any more."""
        return self._again.pop() if self._again else next(self._batches, None)

    def lost(self, batches: Sequence[Sequence[str]]) -> None:
        """A worker died with these, which are not to blame."""
        self._again += batches

    def done(self, worker: int, texts: Sequence[str]) -> None:
        self._raised[worker].clear()
        for text in texts:
            self._attempts.pop(text, None)

    def raised(self, worker: int, texts: Sequence[str], error: Exception) -> Encoded:
        """What has failed for good by that. Raises RunStopped."""
        told = f"{type(error).__name__}: {error}"
        self._raised[worker].add(texts[0])
        hopeless = isinstance(error, LtxBatchError) and not error.retryable
        if hopeless or len(self._raised[worker]) >= self._policy.max_worker_deaths:
            raise RunStopped(f"prompts could not be encoded: {told}") from error
        if len(texts) > 1:
            self._again += [[text] for text in texts]
            return Encoded()
        (text,) = texts
        self._attempts[text] += 1
        if self._attempts[text] < self._policy.max_attempts:
            self._again.insert(0, texts)
            return Encoded()
        del self._attempts[text]
        return Encoded(failed=((text, told),))
