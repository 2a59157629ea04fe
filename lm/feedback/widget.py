"""The ranking page as a widget, for Colab and Jupyter: no server, but the same items, order and verdicts.

    RankingWidget(AnnotationStore("people.db"), "your name")

It has no scores and flags, which the page asks for under "Details".
"""

import html
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

from ipywidgets import HTML, Button, HBox, IntProgress, Layout, VBox

from lm.core.errors import UserError
from lm.data.annotations import Annotation, AnnotationStore, RankingItem
from lm.feedback.app import checked_rater_name, display_order
from lm.runs.html import visible_text

CARD_STYLE = "border: 1px solid #8b8d9288; border-radius: 8px; padding: .5em .9em"
NOTICE_STYLE = "border-left: 4px solid #d9822b; padding: 0 .9em"
TEXT_STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45"
SOFT_STYLE = "opacity: .65; font-size: .85em"
MIN_CLICK_SECONDS = 0.4  # seconds; an earlier click was meant for the previous item


class RankingWidget(VBox):
    """Shows a rater one item of the store after the other. A verdict is on disk before the next item appears.

    The buttons call the public methods, and a program that rates may call them too. `item` is the item that is shown,
    None once this rater has judged everything. A method that cannot be carried out raises UserError, which a button
    shows.
    """

    def __init__(self, store: AnnotationStore, rater: str):
        super().__init__()
        self.rater = checked_rater_name(rater, ())
        self._store = store
        self._bar, self._count, self._notice, self._prompt = IntProgress(), HTML(), HTML(), HTML()
        self._sides = HBox(layout=Layout(flex_flow="row wrap"))
        self._slots: list[VBox] = []  # a response's text and its button, in each place where one was ever shown
        self._tie, self._bad = self._button("Tie", self.tie), self._button("", self.mark_both_bad)
        self._skip, self._undo = self._button("Skip", self.skip), self._button("Undo", self.undo)
        self._save = self._button("Save", self.save)
        layout = Layout(flex_flow="row wrap", margin="0.8em 0 0 0")
        actions = HBox([self._tie, self._bad, self._skip, self._undo, self._save], layout=layout)
        self.children = [HBox([self._bar, self._count]), self._notice, self._prompt, self._sides, actions]
        self._show(store.next_item(self.rater))

    def __repr__(self) -> str:
        return f"RankingWidget({self.rater!r}): {self._count.value}"

    def choose(self, response: int) -> None:
        """Gives item.responses[response] the next rank, or removes its rank. Saves when at most one has none."""
        responses = range(len(self._current_item().responses))
        if response not in responses:
            raise UserError(f"response is {response}; this item has 0 to {responses[-1]}")
        if any(response in place for place in self._best):
            self._best = [left for place in self._best if (left := [i for i in place if i != response])]
        elif self._tying:
            self._best[-1].append(response)
        else:
            self._best.append([response])
        self._tying = False
        self._refresh()  # what is chosen stays, with Save, if the store cannot be written for now
        if sum(map(len, self._best)) >= len(responses) - 1:
            self.save()

    def tie(self) -> None:
        """With two responses: a tie. With more: the next choice shares the rank of the last one."""
        if len(self._current_item().responses) == 2:
            self._record([1, 1], "ranked")
        elif not self._best:
            raise UserError("there is nothing to tie with: choose the best answer first")
        else:
            self._tying = not self._tying
            self._refresh()

    def save(self) -> None:
        """Records the ranks so far; responses without one share the last."""
        count = len(self._current_item().responses)
        if not self._best:
            raise UserError("no answer has a rank yet: choose the best one first")
        self._record(ranks_from_choices(self._best, count), "ranked")

    def mark_both_bad(self) -> None:
        self._record([1] * len(self._current_item().responses), "both bad")

    def skip(self) -> None:
        self._record([1] * len(self._current_item().responses), "skipped")

    def undo(self) -> None:
        """Removes this rater's latest verdict and shows its item again."""
        item = self._store.undo_latest(self.rater)
        if item is None:
            raise UserError(f"{self.rater} has no verdict to take back")
        self._show(item)

    def _current_item(self) -> RankingItem:
        if self.item is None:
            raise UserError(f"{self.rater} has judged everything in {self._store.path}")
        return self.item

    def _record(self, ranking: Sequence[int], verdict: str) -> None:
        timing = {"shown": self._shown, "seconds": time.monotonic() - self._since}
        self._store.record_verdict(
            Annotation(secrets.token_hex(16), self.item.id, self.rater, ranking, verdict, **timing)
        )
        self._show(self._store.next_item(self.rater))

    def _show(self, item: RankingItem | None) -> None:
        self.item, self._since = item, time.monotonic()
        self._best: list[list[int]] = []  # the responses that have a rank, those that share one together
        self._tying = False  # whether the next one chosen shares the last rank
        self._shown = display_order(item, self.rater) if item else []
        for place in range(len(self._slots), len(self._shown)):
            choice = self._button("", lambda place=place: self.choose(self._shown[place]))
            layout = Layout(flex="1 1 16em", min_width="0", justify_content="space-between")
            self._slots.append(VBox([HTML(), choice], layout=layout))
        self._sides.children = self._slots[: len(self._shown)]
        for slot, response in zip(self._slots, self._shown):
            slot.children[0].value = response_html(item.responses[response])
        self._prompt.value = "".join(map(message_html, item.prompt)) if item else "All done. Thank you!"
        self._bad.description = "All bad" if len(self._shown) > 2 else "Both bad"
        self._refresh()

    def _refresh(self) -> None:
        """How far the rater is, what each button says, and whether it can be pressed."""
        judged, self._bar.max = self._store.progress(self.rater)
        self._bar.value, self._count.value = judged, f"{judged} of {self._bar.max} judged"
        ranked = ranks_from_choices(self._best, len(self._shown))
        following = "As good" if self._tying else "Next best" if self._best else "Best"
        for slot, response in zip(self._slots, self._shown):
            has_rank = any(response in place for place in self._best)
            slot.children[1].description = f"Rank {ranked[response]}" if has_rank else following
            slot.children[1].button_style = "primary" if has_rank else ""
        self._skip.disabled = self._bad.disabled = self.item is None
        self._tie.disabled = self.item is None or len(self._shown) > 2 and not self._best
        self._save.disabled, self._undo.disabled = not self._best, not judged

    def _button(self, label: str, action: Callable[[], None]) -> Button:
        button = Button(description=label, layout=Layout(width="auto", min_width="7em"))
        button.on_click(lambda _: self._run_action(action))
        return button

    def _run_action(self, action: Callable[[], None]) -> None:
        if time.monotonic() - self._since < MIN_CLICK_SECONDS:
            return
        try:
            action()
            self._notice.value = ""
        except UserError as error:
            self._notice.value = f'<div role="alert" style="{NOTICE_STYLE}">{escaped_html(str(error))}</div>'


def ranks_from_choices(best: Sequence[Sequence[int]], count: int) -> list[int]:
    """Ranks of `count` responses: 1 plus the number of better ones. Those not in `best` share the last rank."""
    better = lambda i: itertools.takewhile(lambda place: i not in place, best)
    return [1 + sum(map(len, better(i))) for i in range(count)]


def response_html(text: str) -> str:
    html = escaped_html(text) or f'<i style="{SOFT_STYLE}">(an empty answer)</i>'
    return f'<div style="{CARD_STYLE}; {TEXT_STYLE}">{html}</div>'


def message_html(message: Mapping[str, str]) -> str:
    role, content = escaped_html(message["role"]), escaped_html(message["content"])
    return f'<div style="{SOFT_STYLE}">{role}</div><div style="{TEXT_STYLE}">{content}</div>'


def escaped_html(text: str) -> str:
    """Text as markup that shows it as it is."""
    return html.escape(visible_text(text))
