"""The measurements: proxies learn from the gold rater's verdicts, best-of-n and PPO optimize them, and the gold
rater scores the answers."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.core.errors import UserError, check_at_least
from lm.data.preferences import preference_pairs, ranking_json, read_jsonl_rankings
from lm.data.sources import is_held_out
from lm.evaluate.policies import HeldOutPrompts, policy_answerer
from lm.feedback import auto_rank
from lm.generate.sampler import SamplingParams
from lm.rewards import Reward, named_rater
from lm.rewards.load import reward_from_workdir
from lm.rewards.reward_model import reward_ensemble, reward_row_length
from lm.runs.console import Progress, say, warn
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import TrainedModel, load_trained_model, read_json, read_metrics, write_text
from lm.studies.overoptimization.curves import (
    BEST_OF_N,
    PPO,
    RewardCurve,
    best_of_n_counts,
    best_of_n_kl,
    best_of_n_mean,
    within_prompt_deviation,
)
from lm.train import loop

POOL_KEY = 2**30 + 3  # role folded into the key, beside those of lm.stages.rl.rollouts and lm contest


def ranking_subset_file(root: Path, size: int, fraction: float) -> Path:
    """The file of the first `size` decided verdicts and of all held-out ones. A small size is part of a larger one,
    and the members of an ensemble learn from the same verdicts."""
    path = root / "verdicts" / f"rankings-{size}.jsonl"
    if not path.exists():
        decided = [r for r in read_jsonl_rankings(root / "verdicts" / auto_rank.RANKINGS_FILE) if preference_pairs(r)]
        held_out = [r for r in decided if is_held_out(r.name, fraction)]
        train = [r for r in decided if not is_held_out(r.name, fraction)]
        if len(train) < size:
            raise UserError(
                f"the gold rater decided only {len(train):,} pairs to learn from, sizes asks for {size:,}: "
                "raise verdicts.rank.prompts, or lower sizes"
            )
        write_text(path, "".join(f"{ranking_json(ranking)}\n" for ranking in train[:size] + held_out))
    return path


def proxy_workdir(root: Path, size: int, member: int) -> Path:
    return root / "reward" / str(size) / str(member)


class GoldEvaluator:
    """Everything that the measurements share: the start, the prompts, the sampler, the gold rater."""

    def __init__(
        self,
        root: Path,
        start: TrainedModel,
        questions: HeldOutPrompts,
        seed: int,
        *,
        rater: str = "rule",
        samples: int = 128,
        draws: int = 2,
        sampling: SamplingParams = SamplingParams(max_new=24),
        rows_at_once: int = 128,
    ):
        """`samples`: answers a prompt in the pool of best-of-n; `draws`: answers a prompt of each policy of PPO."""
        check_at_least(2, "evaluate", samples=samples)
        check_at_least(1, "evaluate", draws=draws)
        self.root, self.start, self.samples, self._draws = root, start, samples, draws
        self.examples = questions.prompts.examples
        self._prompts, self._key = questions.prompts, jax.random.key(seed)
        self._gold = named_rater(rater, "evaluate.rater")
        self._ask = policy_answerer(start, sampling, rows_at_once=rows_at_once)
        self.longest = reward_row_length(questions.prompts.ids.shape[1], sampling.max_new)

    def answer_pool(self) -> tuple[list[list[str]], np.ndarray]:
        """Texts [N][P] of the start's answers and their gold scores f32[N,P]; kept in pool.jsonl."""
        path, lm = self.root / "pool.jsonl", self.start.params["lm"]
        if not path.exists():

            def drawn(i: int) -> dict[str, list]:
                key = jax.random.fold_in(jax.random.fold_in(self._key, POOL_KEY), i)
                texts = list(self._ask(lm, self._prompts, key).texts)
                return {"texts": texts, "gold": self._gold(self.examples, texts).tolist()}

            lines, parts = [], PartialResults(path.with_suffix(".parts.jsonl"))
            with Progress("pool", self.samples, "answer") as progress:
                for i in range(self.samples):
                    row = parts.once(f"answer {i}", lambda: drawn(i))
                    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
                    progress.update(i + 1, {"gold": float(np.mean(row["gold"]))})
            write_text(path, "".join(lines))
            parts.remove()
        rows = read_metrics(path)
        return [row["texts"] for row in rows], np.array([row["gold"] for row in rows])

    def proxy(self, path: Path) -> Reward:
        """The proxy of a workdir, which must read every prompt and answer whole."""
        return reward_from_workdir(path, self.start.tokenizer, self.longest)[1]

    def policy_scores(
        self, policy: TrainedModel, proxy: Reward, station: int, parts: PartialResults
    ) -> dict[str, list[float]]:
        """KL, gold and proxy score of each prompt's answers by a policy, their means over the draws."""

        def drawn(draw: int) -> dict[str, list]:
            key = jax.random.fold_in(jax.random.fold_in(self._key, station), draw)
            given = self._ask(policy.params["lm"], self._prompts, key)
            return {"kl": given.kl.tolist(), "texts": list(given.texts)}

        columns = []
        for draw in range(self._draws):
            given = parts.once(f"draw {draw}", lambda: drawn(draw))
            scores = [judge(self.examples, given["texts"]) for judge in (self._gold, proxy)]
            columns.append((given["kl"], *scores))
        means = np.mean(np.array(columns, np.float64), axis=0)
        return dict(zip(("kl", "gold", "proxy"), means.tolist()))


def pool_scores(lab: GoldEvaluator, config: ConfigDict) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Gold scores f64[P,N] of the pool, and those of every proxy f64[members,P,N] by its number of verdicts."""
    texts, gold = lab.answer_pool()
    examples, flat = list(lab.examples) * len(texts), [text for row in texts for text in row]
    proxies = {}
    for size, member in itertools.product(config.sizes, range(config.members)):
        path = lab.root / "pool" / f"{size}-{member}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            proxy = lab.proxy(proxy_workdir(lab.root, size, member))
            write_text(path, json.dumps(proxy(examples, flat).tolist()))
            say(f"pool: {len(flat):,} answers scored by proxy {member} from {size:,} verdicts")
        scores = np.array(read_json(path)).reshape(len(texts), -1).T
        proxies.setdefault(size, []).append(scores)
    return gold.T, {size: np.array(scores) for size, scores in proxies.items()}


def ensemble_scores(scores: np.ndarray, pessimism: float) -> np.ndarray:
    """The scores of an ensemble, from the scores of its members [members, ...]."""
    return reward_ensemble([lambda *_, member=member: member for member in scores], pessimism=pessimism)(None, None)


def best_of_n_curves(
    lab: GoldEvaluator, gold: np.ndarray, proxies: Mapping[int, np.ndarray], config: ConfigDict
) -> list[RewardCurve]:
    """The curves of best-of-n, for every number of verdicts: a single proxy (the mean over members) and the
    ensemble."""
    stations = best_of_n_counts(lab.samples)
    kl = np.repeat(best_of_n_kl(np.array(stations))[:, None], len(gold), axis=1)

    def gain(values, by):
        each = np.array([best_of_n_mean(values, by, n) for n in stations])
        return (each - values.mean(axis=1)) / within_prompt_deviation(values)

    curves = []
    for size, members in proxies.items():
        single = [
            np.mean([gain(values, by) for values, by in pairs], axis=0)
            for pairs in ([(gold, by) for by in members], [(by, by) for by in members])
        ]
        curves.append(RewardCurve(BEST_OF_N, size, 1, stations, kl, *single))
        if len(members) > 1:
            by = ensemble_scores(members, config.pessimism)
            curves.append(RewardCurve(BEST_OF_N, size, len(members), stations, kl, gain(gold, by), gain(by, by)))
    return curves


def ppo_workdir(root: Path, size: int, members: int) -> Path:
    return root / "ppo" / (str(size) if members == 1 else f"{size}x{members}")


def train_ppo_on_proxy(config: ConfigDict, root: Path, size: int, members: int) -> None:
    """Trains PPO on the first proxy, or on the ensemble, and keeps the policy of every `save_every`."""
    policy = config.ppo.copy_and_resolve_references()
    policy.data.reward_model = ",".join(str(proxy_workdir(root, size, member)) for member in range(members))
    policy.data.pessimism = config.pessimism
    say(f"\nppo, {size:,} verdicts, {members} proxies: {ppo_workdir(root, size, members)}")
    loop.train_stage(policy, ppo_workdir(root, size, members))


def ppo_curve(
    lab: GoldEvaluator, config: ConfigDict, gold: np.ndarray, proxies: Mapping[int, np.ndarray], size: int, members: int
) -> RewardCurve:
    """The curve of one PPO run: every saved policy answers the prompts of the pool."""
    path, stations = ppo_workdir(lab.root, size, members), config.ppo.train
    stations = list(range(stations.save_every, stations.steps + 1, stations.save_every))
    paths = [proxy_workdir(lab.root, size, member) for member in range(members)]
    proxy = lab.proxy(paths[0])
    if members > 1:
        proxy = reward_ensemble([lab.proxy(each) for each in paths], pessimism=config.pessimism)
    measured = []
    with Progress("measured", len(stations), "policy") as progress:
        for i, station in enumerate(stations):
            file = path / f"measured-{station}.json"
            if not file.exists():
                policy = load_trained_model(path, backend=jax.default_backend(), step=station, warn=warn)
                parts = PartialResults(file.with_suffix(".parts.jsonl"))
                write_text(file, json.dumps(lab.policy_scores(policy, proxy, station, parts)))
                parts.remove()
            measured.append(read_json(file))
            progress.update(i + 1, {name: float(np.mean(values)) for name, values in measured[-1].items()})
    kl, gold_scores, proxy_scores = (
        np.array([each[column] for each in measured]) for column in ("kl", "gold", "proxy")
    )
    before = ensemble_scores(proxies[size][:members], config.pessimism) if members > 1 else proxies[size][0]
    return RewardCurve(
        PPO,
        size,
        members,
        stations,
        kl,
        (gold_scores - gold.mean(axis=1)) / within_prompt_deviation(gold),
        (proxy_scores - before.mean(axis=1)) / within_prompt_deviation(before),
    )
