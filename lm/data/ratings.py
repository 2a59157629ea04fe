"""Real people's ratings as rankings: the conversations of `chitchat-dataset` (MIT), rated by the people who took part.

Of 7,168 conversations 5,988 have three ratings from 1 to 10: witty, interesting, upbeat. In 3,705 of them the second
person replied; those are ranked here. The data do not say which of the two rated; we assume the one who spoke first.
36 % are rated 5, 5, 5, which is also the default of the form, so these preferences are noisy.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from lm.data import sources
from lm.data.preferences import Ranking

RATING_NAMES = ("witty", "interesting", "upbeat")
RATER_BUCKETS = 20  # raters fall into so many groups by hash; a ranking compares conversations of one group only
MAX_CONVERSATIONS = 4  # conversations in a ranking
BEST_RATING = 10  # of each rating


class RatedConversation(NamedTuple):
    key: str
    opener: str  # the question that both were given
    first_speaker: str  # who spoke first
    turns: list[str]
    ratings: dict[str, int]  # of each of RATING_NAMES, 1 to 10


def chitchat_rankings() -> list[Ranking]:
    """Rankings of up to MAX_CONVERSATIONS conversations each, all from the same opener and from raters of one bucket.

    The prompt is the opener, a response is a conversation, a line a turn. Overall the sum of the three ratings decides:
    ranks are 1 for 30 points, 2 for 29, and so on, so they also say by how much. A ranking has the name of its bucket,
    so a held-out rater is held out with everything that he rated.
    """
    cells = defaultdict(list)
    for rated in _rated_conversations():
        bucket = int.from_bytes(hashlib.sha256(rated.first_speaker.encode()).digest()[:8], "big") % RATER_BUCKETS
        cells[rated.opener, bucket].append(rated)
    return [
        _bucket_ranking(opener, bucket, cell[i : i + MAX_CONVERSATIONS])
        for (opener, bucket), cell in sorted(cells.items())
        for i in range(0, len(cell) - 1, MAX_CONVERSATIONS)
    ]


BUILT_IN_RANKINGS = {"chitchat": chitchat_rankings}


def _bucket_ranking(opener: str, bucket: int, rated: list[RatedConversation]) -> Ranking:
    sums = [sum(one.ratings.values()) for one in rated]
    return Ranking(
        name=f"chitchat/raters/{bucket}",
        prompt=[{"role": "user", "content": opener}],
        responses=["\n".join(f"- {turn}" for turn in one.turns) for one in rated],
        ranking=[BEST_RATING * len(RATING_NAMES) + 1 - total for total in sums],
        rater=f"raters {bucket}",
        time=datetime(2018, 4, 18, tzinfo=UTC).isoformat(),  # when the Chit-Chat Challenge began
        axes={axis: [one.ratings[axis] for one in rated] for axis in RATING_NAMES},
    )


def _rated_conversations() -> Iterator[RatedConversation]:
    """The rated conversations in which the second person replied, in an order drawn from their keys."""
    found = []
    for key, conversation in sources.chitchat_dataset().items():
        turns = sources.speaker_turns(conversation)
        if len(turns) >= 2 and "ratings" in conversation:
            messages = [text for _, text in turns]
            found.append(RatedConversation(key, conversation["prompt"], turns[0][0], messages, conversation["ratings"]))
    yield from sorted(found, key=lambda rated: hashlib.sha256(rated.key.encode()).digest())
