"""Chats in the terminal with the model of a run.

    python -m lm chat --workdir=runs/quickstart
    python -m lm chat --workdir=runs/quickstart --prompt="How was your day?" --temperature=0

Answers appear as they are sampled. The workdir is that of one stage, or a pipeline's folder, whose last policy then
answers. A model that was only pretrained continues the text it is given. A chat template that contains the date gets
the date on which the chat began, not that of training. /reset starts over, /exit or ctrl-D leaves, ctrl-C stops an
answer.

    python -m lm chat --workdir=runs/large --draft=runs/small --draft_tokens=4

--draft names a smaller model with the same tokenizer. It proposes tokens, and the large model checks several at a time
(see lm.generate.speculative): answers have the same distribution as without a draft, and come faster where the draft
guesses well.
"""

import readline  # noqa: F401  gives input() its line editing and history
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import jax
import numpy as np

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.statistics import success_rate
from lm.evaluate.quantization import with_storage_dtypes
from lm.generate.answers import check_stop_strings, text_before_stop, text_without_partial_stop
from lm.generate.sampler import SamplingParams, check_sampling
from lm.generate.speculative import TargetDraft, check_speculation
from lm.generate.streaming import speculative_token_streamer, token_streamer
from lm.model.quantization import STORAGE_DTYPES
from lm.runs.console import run_program, warn
from lm.runs.workdir import TrainedModel, check_same_tokenizer
from lm.tokenizer import Message, Tokenizer, encode_prompt
from lm.train.warm_start import load_policy, policy_folder

DEFAULT_MAX_NEW = 128  # tokens of the longest answer, unless a flag sets it or the context has less room
SHOWN_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of SamplingParams, in the banner
FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help="a pipeline's folder, or a stage's own"),
    "prompt": dict(metavar="TEXT", help="print one answer to it and exit"),
    "temperature": dict(type=float, default=0.7, help="0 always takes the likeliest token; default: 0.7"),
    "top_k": dict(type=int, default=0, help="sample among the k likeliest tokens only; default: 0, all"),
    "top_p": dict(type=float, default=1.0, help="among the likeliest whose probability reaches p; default: 1"),
    "min_p": dict(type=float, default=0.0, help="those at least p times as probable as the likeliest; default: 0, all"),
    "repetition_penalty": dict(
        type=float, default=1.0, help="above 1: tokens that occurred before become less likely; default: 1"
    ),
    "stop": dict(
        action="append", default=[], metavar="TEXT", help="end an answer before this text; may be given several times"
    ),
    "seed": dict(type=int, default=0, help="the same seed gives the same answers; default: 0"),
    "draft": dict(metavar="DIR", help="a smaller model's, which proposes tokens; default: none"),
    "draft_tokens": dict(type=int, default=4, help="with --draft: tokens it proposes at a time; default: 4"),
    "weights": dict(
        choices=STORAGE_DTYPES, default="", help="how the weights are kept; default: as the run keeps them"
    ),
    "cache": dict(choices=STORAGE_DTYPES, default="", help="how the key-value cache is kept; default: as the run says"),
    "max_new_tokens": dict(
        type=int, help=f"the longest answer; default: {DEFAULT_MAX_NEW}, or what the context leaves"
    ),
}


def printable_text(text: str) -> str:
    """`text` without control characters but newline and tab: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def stable_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The printable text of `ids` that no further id can change: a last character may still lack some of its bytes."""
    return printable_text(tokenizer.decode(ids)).rstrip("\ufffd")


def recent_messages(tokenizer: Tokenizer, messages: list[Message], room: int) -> list[Message]:
    """The last messages that make a prompt of at most `room` tokens: whole exchanges, and always the last message."""
    while len(messages) > 1 and len(encode_prompt(tokenizer, messages)) > room:
        messages = messages[2:]
    return messages


class Chat:
    """A conversation with a trained model. Answer i is drawn with fold_in(key(seed), i), across resets.

    max_new: tokens an answer may have; None: DEFAULT_MAX_NEW, or what the context leaves. notify: given notes for the
    user. stop: strings before the first of which an answer ends. draft: a model that proposes `draft_tokens` at a time.
    """

    def __init__(
        self,
        trained: TrainedModel,
        notify: Callable[[str], None],
        *,
        seed: int = 0,
        max_new: int | None = None,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        draft: TrainedModel | None = None,
        draft_tokens: int = 4,
    ):
        if draft:
            check_same_tokenizer(trained, draft)
        self._drafted = f"; {draft.path} proposes {draft_tokens} tokens at a time" if draft else ""
        self._models = TargetDraft(trained.model, draft.model) if draft else None
        self._ahead, contexts = draft_tokens, [model.config.context for model in self._models or [trained.model]]
        self._context, self._whose = min(contexts), "model" if contexts[0] == min(contexts) else "draft"
        check_stop_strings(stop)
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
        if max_new is not None and max_new >= self._context:
            raise UserError(f"max_new_tokens is {max_new}, but prompt and answer share {self._context}: lower it")
        now = datetime.now().isoformat(timespec="minutes")  # for a template that contains the date
        self._trained = trained._replace(tokenizer=trained.tokenizer.dated(now))
        self._sampling = SamplingParams(
            max_new=1 if max_new is None else max_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        self._check(1, self._sampling.max_new)
        self._note, self._seed, self._max_new, self._stop = notify, seed, max_new, tuple(stop)
        self._lm = jax.device_put(trained.params["lm"])
        self._proposed = self._accepted = 0
        if self._models and draft:
            self._stream = speculative_token_streamer(
                self._models, draft.params["lm"], self._count_proposals, self._sampling, draft_tokens=draft_tokens
            )
        else:
            self._stream = token_streamer(trained.model, self._sampling)
        self._answers = 0
        self.reset()

    def __str__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self._trained.params["lm"]))
        sampling = {name: getattr(self._sampling, name) for name in SHOWN_FIELDS} | {"seed": self._seed}
        sampler = ", ".join(f"{name} {value:g}" for name, value in sampling.items())
        plain = (
            "" if self._is_chat_model else "\nit was only pretrained: it continues your text instead of answering it"
        )
        return (
            f"{self._trained.stage} model of {self._trained.path}: {size:,} parameters, "
            f"context {self._context} tokens; {sampler}{self._drafted}{plain}"
        )

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages: list[Message] = []
        self.has_ended = True  # whether the last answer ended by itself
        self._told = False

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text`, in pieces as it comes; the conversation keeps both. UserError if `text` is invalid."""
        if not text.strip():
            raise UserError("the prompt is empty: write something")
        kept, ids = self._fitting_prompt([*self.messages, {"role": "user", "content": text}])
        room = self._context - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the {self._whose}'s context is {self._context}: shorten it"
            )
        max_new = min(DEFAULT_MAX_NEW, room) if self._max_new is None else self._max_new
        self._check(len(ids), max_new)
        if len(kept) <= len(self.messages) and self._is_chat_model and not self._told:
            self._note(
                f"the conversation has outgrown the context of {self._context} tokens: "
                "from now on its oldest exchanges are left out"
            )
            self._told = True
        self.messages = kept
        return self._streamed_answer(ids, max_new)

    def acceptance_text(self) -> str:
        """How many of the last answer's proposals were accepted, with an interval as if each were judged by itself;
        empty without a draft."""
        if not self._proposed:
            return ""
        share = success_rate([True] * self._accepted + [False] * (self._proposed - self._accepted))
        return (
            f"{self._accepted} of {self._proposed} proposed tokens were accepted: {share.value:.0%} "
            f"(95% interval {share.low:.0%} to {share.high:.0%})"
        )

    def _count_proposals(self, proposed: int, accepted: int) -> None:
        self._proposed, self._accepted = self._proposed + proposed, self._accepted + accepted

    def _check(self, prompt: int, max_new: int) -> None:
        sampling = self._sampling._replace(max_new=max_new)
        if self._models:
            check_speculation(self._models, prompt, sampling, draft_tokens=self._ahead)
        else:
            check_sampling(self._trained.model, prompt, sampling)

    @property
    def _is_chat_model(self) -> bool:
        return self._trained.stage != "pretrain"

    def _fitting_prompt(self, messages: list[Message]) -> tuple[list[Message], np.ndarray]:
        """The part of the conversation that fits, and its ids; of a model without chat training, the last message and
        the ids of its text."""
        tokenizer = self._trained.tokenizer
        if not self._is_chat_model:
            return messages[-1:], np.array([*tokenizer.start_ids, *tokenizer.encode(messages[-1]["content"])], np.int32)
        reserved = min(DEFAULT_MAX_NEW, self._context // 4) if self._max_new is None else self._max_new
        kept = recent_messages(tokenizer, messages, self._context - reserved)
        return kept, encode_prompt(tokenizer, kept)

    def _streamed_answer(self, ids: np.ndarray, max_new: int) -> Iterator[str]:
        tokenizer = self._trained.tokenizer
        key = jax.random.fold_in(jax.random.key(self._seed), self._answers)
        self._answers += 1
        self._proposed = self._accepted = 0
        token_ids, printed = [], ""
        try:
            for token in self._stream(self._lm, ids, key, max_new=max_new, stop=tokenizer.stop_ids):
                token_ids.append(token)
                so_far, has_stop = text_before_stop(stable_text(tokenizer, token_ids), self._stop)
                if has_stop:
                    break
                so_far = text_without_partial_stop(so_far, self._stop)
                yield so_far[len(printed) :]
                printed = so_far
            yield text_before_stop(printable_text(tokenizer.decode(token_ids)), self._stop)[0][len(printed) :]
        finally:  # also when the answer is cut short
            text, has_stop = text_before_stop(printable_text(tokenizer.decode(token_ids)), self._stop)
            self.has_ended = has_stop or bool(token_ids) and token_ids[-1] in tokenizer.stop_ids
            self.messages.append({"role": "assistant", "content": text})


def print_answer(chat: Chat, text: str) -> None:
    """Prints the answer as it comes."""
    for piece in chat.answer(text):
        print(piece, end="", flush=True)
    print(flush=True)
    if not chat.has_ended:
        print_note("(cut off at max_new_tokens, or by the end of the context)")
    if acceptance := chat.acceptance_text():
        print_note(f"({acceptance})")


def run_chat(chat: Chat) -> None:
    """Reads lines and answers them until /exit or the end of the input."""
    while True:
        try:
            line = input("\nyou> ").removeprefix("\ufeff").strip()  # a piped file may begin with a byte order mark
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
            print_note("a new conversation")
        elif line:
            try:
                print_answer(chat, line)
            except KeyboardInterrupt:
                print_note("\n(cut short)")
            except UserError as error:
                print_note(f"error: {error}")


def print_note(text: str) -> None:
    """One line on stderr, so that stdout holds nothing but the conversation."""
    print(text, file=sys.stderr, flush=True)


def load_chat_policy(workdir: str) -> TrainedModel:
    """What speaks in a workdir, or in a pipeline's folder. UserError for a reward model."""
    return load_policy(policy_folder(Path(workdir)), backend=jax.default_backend(), warn=warn)


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # whatever bytes or characters the terminal does not know
    chat = Chat(
        with_storage_dtypes(load_chat_policy(flags.workdir), weights=flags.weights, cache=flags.cache),
        print_note,
        seed=flags.seed,
        max_new=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        repetition_penalty=flags.repetition_penalty,
        stop=flags.stop,
        draft=None if flags.draft is None else load_chat_policy(flags.draft),
        draft_tokens=flags.draft_tokens,
    )
    if flags.prompt is not None:
        print_answer(chat, flags.prompt)
        return
    print_note(f"{chat}\n/reset starts over, /exit leaves")
    run_chat(chat)


if __name__ == "__main__":
    run_program(program)
