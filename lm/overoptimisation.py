"""Over-optimisation: what the gold rater says while a policy is pushed ever further up a reward model learnt from it.

    python -m lm.overoptimisation --config=experiments/overoptimisation.py --workdir=runs/overoptimisation

The gold rater ranks answers of the starting model; proxy reward models learn from few and from many of its verdicts;
best-of-n and PPO climb each proxy, and an ensemble of several from the same verdicts, while the gold rater watches.
Writes WORKDIR/summary.json, overoptimisation.html, .svg and .png. The same command continues after a kill. Gao,
Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.lines import Line2D
from ml_collections import ConfigDict
from scipy.special import gammaln

from lm import train, verdicts
from lm.agreement import bootstrap
from lm.config import arguments, call, require, to_dict
from lm.console import Progress, main, say, table, warn
from lm.data import rankings as records
from lm.data.corpus import held_out
from lm.errors import UserError, at_least
from lm.intervals import Estimate, average, crossed
from lm.pages import COLOURS, INK, interval, png, signed, svg, templates
from lm.rewards import REWARDS, Reward
from lm.rewards.model import ensemble
from lm.unseen import Asked, answerer, asked
from lm.workdir import Trained, load, load_reward, open_workdir, read_json, write_text

NAME = "overoptimisation"  # of the page and the pictures
BEST_OF_N, PPO = "best of n", "ppo"
POOL = 2**30 + 3  # role folded into the key, beside those of lm.stages.rollouts and lm.contest
ENTRIES = ("seed", "init_from", "sizes", "reward_steps", "members", "pessimism", "verdicts", "reward", "ppo")
ENTRIES += ("prompts", "evaluate")
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the lab's folder; the same command continues")}

# R(d) = alpha * first + beta * second, with d the square root of the KL (Gao et al. 2022, eq. 1 and 2).
FORMS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    BEST_OF_N: lambda d: np.stack([d, -d * d]),  # d (alpha - beta d)
    PPO: lambda d: np.stack([d, -d * np.log(d)]),  # d (alpha - beta log d)
}
PEAKS: Mapping[str, Callable[[float, float], float]] = {  # the d at which that is largest, for beta > 0
    BEST_OF_N: lambda alpha, beta: alpha / (2 * beta),
    PPO: lambda alpha, beta: float(np.exp(alpha / beta - 1)),
}


class Curve(NamedTuple):
    """One way of climbing one proxy: K stations, P prompts. Gains are over the start, in deviations of its answers."""

    method: str  # BEST_OF_N or PPO
    verdicts: int  # that the proxy learnt from
    members: int  # 1: a single proxy; more: an ensemble
    stations: Sequence[int]  # n, or updates
    kl: np.ndarray  # f64[K,P]
    gold: np.ndarray  # f64[K,P]
    proxy: np.ndarray  # f64[K,P]

    @property
    def distance(self) -> np.ndarray:
        """f64[K]: the square root of the KL."""
        return np.sqrt(np.maximum(self.kl.mean(axis=1), 1e-6))

    @property
    def name(self) -> str:
        proxies = "one proxy" if self.members == 1 else f"{self.members} proxies"
        return f"{self.method}, {self.verdicts:,} verdicts, {proxies}"


def run(config: ConfigDict, path: str | Path) -> dict[str, Any]:
    """Makes whatever is missing, in order; writes the page; returns the summary."""
    require(config, ENTRIES, "lm.overoptimisation")
    check(config)
    started = time.monotonic()
    with open_workdir(path, to_dict(config)) as workdir:
        root = workdir.path
        start = load(config.init_from, backend=jax.default_backend(), warn=warn)
        questions = call(asked, config.prompts, start.tokenizer, name="prompts")
        lab = call(Lab, config.evaluate, root, start, questions, config.seed, name="evaluate")
        say(f"\nverdicts: {root / 'verdicts'}")
        verdicts.run(config.verdicts, root / "verdicts")
        files = [chosen(root, size, config.reward.data.held_out) for size in config.sizes]
        for size, steps, file in zip(config.sizes, config.reward_steps, files):
            for member in range(config.members):
                say(f"\nproxy {member} from {size:,} verdicts: {proxy_path(root, size, member)}")
                proxy = config.reward.copy_and_resolve_references()
                proxy.seed = member
                proxy.data.rankings = str(file)
                proxy.train.steps = proxy.optimizer.total_steps = steps
                train.run(proxy, proxy_path(root, size, member))
        gold, proxies = pool(lab, config)
        curves = best_of_n_curves(lab, gold, proxies, config)
        for size, members in itertools.product(config.sizes, dict.fromkeys((1, config.members))):
            climb(config, root, size, members)
            curves.append(ppo_curve(lab, config, gold, proxies, size, members))
        summary = summary_of(curves, gold, proxies, root, config)
        workdir.write_summary(summary)
        show(summary)
        for file in written(root, summary, curves):
            say(f"written: {file}")
        say(f"{time.monotonic() - started:.0f} s now")
        return summary


def check(config: ConfigDict) -> None:
    """UserError for settings that cannot be carried out, before anything is."""
    if not config.sizes or list(config.sizes) != sorted(set(config.sizes)):
        raise UserError(f"sizes is {tuple(config.sizes)}: give numbers of verdicts, each once, the smallest first")
    if len(config.reward_steps) != len(config.sizes):
        raise UserError(
            f"reward_steps has {len(config.reward_steps)} entries for {len(config.sizes)} sizes: one for each"
        )
    at_least(1, "config", sizes=config.sizes[0], reward_steps=min(config.reward_steps), members=config.members)
    at_least(0, "config", pessimism=config.pessimism)
    if config.evaluate.rater not in REWARDS or config.verdicts.rank.rater != config.evaluate.rater:
        raise UserError(
            f"evaluate.rater is {config.evaluate.rater!r}, verdicts.rank.rater {config.verdicts.rank.rater!r}: "
            f"the gold rater must be the same, one of {', '.join(REWARDS)}"
        )
    unseen = {"ppo.data": config.ppo.data.held_out, "verdicts.rank": config.verdicts.rank.held_out}
    for name, fraction in unseen.items():
        if fraction != config.prompts.held_out:
            raise UserError(
                f"{name}.held_out is {fraction}, prompts.held_out {config.prompts.held_out}: they must be the same, "
                "or the prompts are not unseen"
            )
    schedule = config.ppo.train
    if schedule.steps % schedule.save_every or schedule.keep < schedule.steps // schedule.save_every:
        raise UserError(
            f"ppo.train has steps {schedule.steps}, save_every {schedule.save_every} and keep {schedule.keep}: every "
            "saved policy is a point of the curve, so steps must be a multiple of save_every, and all must be kept"
        )


def chosen(root: Path, size: int, fraction: float) -> Path:
    """The file of the first `size` verdicts that decide something, and of all the held-out ones. A small size is part
    of a larger one, and the members of an ensemble learn from the same."""
    path = root / "verdicts" / f"rankings-{size}.jsonl"
    if not path.exists():
        decided = [r for r in records.read(root / "verdicts" / verdicts.RANKINGS) if records.pairs(r)]
        unseen = [r for r in decided if held_out(r.name, fraction)]
        seen = [r for r in decided if not held_out(r.name, fraction)]
        if len(seen) < size:
            raise UserError(
                f"the gold rater decided only {len(seen):,} pairs to learn from, sizes asks for {size:,}: "
                "raise verdicts.rank.prompts, or lower sizes"
            )
        write_text(path, "".join(f"{records.line(ranking)}\n" for ranking in seen[:size] + unseen))
    return path


def proxy_path(root: Path, size: int, member: int) -> Path:
    return root / "reward" / str(size) / str(member)


class Lab:
    """What every measurement shares: the start, the prompts, the sampler, the gold rater."""

    def __init__(
        self,
        root: Path,
        start: Trained,
        questions: Asked,
        seed: int,
        *,
        rater: str = "rule",
        samples: int = 128,
        draws: int = 2,
        max_new: int = 24,
        temperature: float = 1.0,
        rows_at_once: int = 128,
    ):
        """`samples`: answers a prompt in the pool of best-of-n; `draws`: answers a prompt of each policy of PPO."""
        at_least(2, "evaluate", samples=samples)
        at_least(1, "evaluate", draws=draws)
        self.root, self.start, self.samples, self._draws = root, start, samples, draws
        self.contexts = questions.prompts.contexts
        self._prompts, self._key, self._gold = questions.prompts, jax.random.key(seed), REWARDS[rater]
        self._ask = answerer(start, max_new=max_new, temperature=temperature, rows_at_once=rows_at_once)

    def pool(self) -> tuple[list[list[str]], np.ndarray]:
        """Texts [N][P] of the start's answers and their gold scores f32[N,P]; kept in pool.jsonl."""
        path, lm = self.root / "pool.jsonl", self.start.params["lm"]
        if not path.exists():
            lines = []
            with Progress("pool", self.samples, "answer") as progress:
                for i in range(self.samples):
                    key = jax.random.fold_in(jax.random.fold_in(self._key, POOL), i)
                    texts = self._ask(lm, self._prompts, key).texts
                    gold = self._gold(self.contexts, texts)
                    lines.append(json.dumps({"texts": texts, "gold": gold.tolist()}, ensure_ascii=False) + "\n")
                    progress.update(i + 1, {"gold": float(gold.mean())})
            write_text(path, "".join(lines))
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        return [row["texts"] for row in rows], np.array([row["gold"] for row in rows])

    def measured(self, policy: Trained, proxy: Reward, station: int) -> dict[str, list[float]]:
        """KL, gold and proxy score of each prompt's answers by a policy, their means over the draws."""
        found = []
        for draw in range(self._draws):
            key = jax.random.fold_in(jax.random.fold_in(self._key, station), draw)
            given = self._ask(policy.params["lm"], self._prompts, key)
            found.append((given.kl, self._gold(self.contexts, given.texts), proxy(self.contexts, given.texts)))
        means = np.mean(np.array(found, np.float64), axis=0)
        return dict(zip(("kl", "gold", "proxy"), means.tolist()))


def pool(lab: Lab, config: ConfigDict) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Gold scores f64[P,N] of the pool, and those of every proxy f64[members,P,N] by its number of verdicts."""
    texts, gold = lab.pool()
    contexts, flat = list(lab.contexts) * len(texts), [text for row in texts for text in row]
    proxies = {}
    for size, member in itertools.product(config.sizes, range(config.members)):
        path = lab.root / "pool" / f"{size}-{member}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            proxy = reward_of(proxy_path(lab.root, size, member))
            write_text(path, json.dumps(proxy(contexts, flat).tolist()))
            say(f"pool: {len(flat):,} answers scored by proxy {member} from {size:,} verdicts")
        scores = np.array(json.loads(path.read_text())).reshape(len(texts), -1).T
        proxies.setdefault(size, []).append(scores)
    return gold.T, {size: np.array(scores) for size, scores in proxies.items()}


def reward_of(path: Path) -> Reward:
    return load_reward(path, backend=jax.default_backend(), centred=True, jit=jax.jit, warn=warn)[1]


def together(scores: np.ndarray, pessimism: float) -> np.ndarray:
    """What an ensemble says where its members say scores [members, ...]."""
    return ensemble([lambda *_, said=said: said for said in scores], pessimism=pessimism)(None, None)


def deviation(scores: np.ndarray) -> float:
    """The standard deviation of scores [P,N] within a prompt, over all prompts."""
    return float(np.sqrt(np.var(scores, axis=1, ddof=1).mean()))


def best_of(values: np.ndarray, by: np.ndarray, n: int) -> np.ndarray:
    """f64[P]: the mean of `values` at the answer that is best `by`, over all choices of n of the N answers; both [P,N].

    sum_i C(i - 1, n - 1) / C(N, n) * value_(i), with i the rank by `by`, 1 the lowest: unbiased for n fresh answers.
    Where several are equal `by`, each is as likely to be taken. Nakano et al. 2021, app. I, arXiv 2112.09332; Gao et
    al. 2022, sec. 2.
    """
    N = by.shape[1]
    i = np.arange(n, N + 1)
    weights = np.exp(_log_choose(i - 1, n - 1) - _log_choose(N, n))
    return np.array([_tied(v, b)[np.argsort(b, kind="stable")][n - 1 :] @ weights for v, b in zip(values, by)])


def _tied(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Each value replaced by the mean over those that are equal `by`."""
    _, group, counts = np.unique(by, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=values) / counts)[group]


def _log_choose(n, k):
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def best_of_n_kl(n):
    """log n - (n - 1) / n: an upper bound, met where no two answers are alike (Beirami et al. 2024, arXiv
    2401.01879)."""
    return np.log(n) - (n - 1) / n


def counts(most: int) -> list[int]:
    """1 and then about four n in each doubling, up to `most`."""
    return sorted({1, *np.unique(np.round(np.geomspace(1, most, int(4 * np.log2(most)) + 1)).astype(int)).tolist()})


def best_of_n_curves(lab: Lab, gold: np.ndarray, proxies: Mapping[int, np.ndarray], config: ConfigDict) -> list[Curve]:
    """Of every number of verdicts, a single proxy (the mean of what each member alone chooses), and the ensemble."""
    stations = counts(lab.samples)
    kl = np.repeat(best_of_n_kl(np.array(stations))[:, None], len(gold), axis=1)

    def gain(values, by):
        each = np.array([best_of(values, by, n) for n in stations])
        return (each - values.mean(axis=1)) / deviation(values)

    curves = []
    for size, members in proxies.items():
        single = [
            np.mean([gain(values, by) for values, by in pairs], axis=0)
            for pairs in ([(gold, by) for by in members], [(by, by) for by in members])
        ]
        curves.append(Curve(BEST_OF_N, size, 1, stations, kl, *single))
        if len(members) > 1:
            by = together(members, config.pessimism)
            curves.append(Curve(BEST_OF_N, size, len(members), stations, kl, gain(gold, by), gain(by, by)))
    return curves


def ppo_path(root: Path, size: int, members: int) -> Path:
    return root / "ppo" / (str(size) if members == 1 else f"{size}x{members}")


def climb(config: ConfigDict, root: Path, size: int, members: int) -> None:
    """Trains PPO on the first proxy, or on the ensemble, and keeps the policy of every `save_every`."""
    policy = config.ppo.copy_and_resolve_references()
    policy.data.reward_model = ",".join(str(proxy_path(root, size, member)) for member in range(members))
    policy.data.pessimism = config.pessimism
    say(f"\nppo, {size:,} verdicts, {members} proxies: {ppo_path(root, size, members)}")
    train.run(policy, ppo_path(root, size, members))


def ppo_curve(
    lab: Lab, config: ConfigDict, gold: np.ndarray, proxies: Mapping[int, np.ndarray], size: int, members: int
) -> Curve:
    """Every saved policy of one run, asked the prompts of the pool."""
    path, stations = ppo_path(lab.root, size, members), config.ppo.train
    stations = list(range(stations.save_every, stations.steps + 1, stations.save_every))
    paths = [proxy_path(lab.root, size, member) for member in range(members)]
    proxy = reward_of(paths[0])
    if members > 1:
        proxy = ensemble([reward_of(each) for each in paths], pessimism=config.pessimism)
    found = []
    with Progress("measured", len(stations), "policy") as progress:
        for i, station in enumerate(stations):
            file = path / f"measured-{station}.json"
            if not file.exists():
                policy = load(path, backend=jax.default_backend(), step=station, warn=warn)
                write_text(file, json.dumps(lab.measured(policy, proxy, station)))
            found.append(read_json(file))
            progress.update(i + 1, {name: float(np.mean(values)) for name, values in found[-1].items()})
    kl, said, claimed = (np.array([each[column] for each in found]) for column in ("kl", "gold", "proxy"))
    before = together(proxies[size][:members], config.pessimism) if members > 1 else proxies[size][0]
    return Curve(
        PPO,
        size,
        members,
        stations,
        kl,
        (said - gold.mean(axis=1)) / deviation(gold),
        (claimed - before.mean(axis=1)) / deviation(before),
    )


def fitted(form: str, d: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(alpha, beta) of the form in FORMS that is nearest to gain f64[K] at distances d f64[K], by least squares; the
    station at distance 0 says nothing."""
    away = d > 1e-2
    return np.linalg.lstsq(FORMS[form](d[away]).T, gain[away], rcond=None)[0]


def coefficients(curve: Curve, gain: np.ndarray) -> dict[str, Any]:
    """alpha and beta with the intervals of a bootstrap over prompts, and where the form is largest, if beta > 0."""
    both = np.concatenate([curve.kl, gain])

    def statistic(which: int, rows: np.ndarray) -> float:
        kl, score = np.split(rows.mean(axis=-1), 2)
        return float(fitted(curve.method, np.sqrt(np.maximum(kl, 0.0)), score)[which])

    alpha, beta = (bootstrap(functools.partial(statistic, which), both) for which in (0, 1))
    return {
        "alpha": alpha._asdict(),
        "beta": beta._asdict(),
        "peak": PEAKS[curve.method](alpha.value, beta.value) if beta.value > 0 else None,
    }


def fall(curve: Curve) -> Estimate:
    """How far the gold score is, at the last station, from its highest: the station is chosen on one half of the
    prompts and the fall measured on the other, both ways round, so that choosing the luckiest station costs nothing."""
    falls = np.empty(curve.gold.shape[1])
    for half in (0, 1):
        best = np.argmax(curve.gold[:, half::2].mean(axis=1))
        falls[1 - half :: 2] = (curve.gold[-1] - curve.gold[best])[1 - half :: 2]
    return average(falls)


def summary_of(
    curves: Sequence[Curve], gold: np.ndarray, proxies: Mapping[int, np.ndarray], root: Path, config: ConfigDict
) -> dict[str, Any]:
    """The curves as points, their fits, whether gold turns down, and what ensembles change."""
    told = []
    for curve in curves:
        highest = int(np.argmax(curve.gold.mean(axis=1)))
        down = fall(curve)
        told.append(
            {
                "name": curve.name,
                "method": curve.method,
                "verdicts": curve.verdicts,
                "members": curve.members,
                "stations": list(curve.stations),
                "distance": curve.distance.tolist(),
                "gold": [average(each)._asdict() for each in curve.gold],
                "proxy": [average(each)._asdict() for each in curve.proxy],
                "fit": coefficients(curve, curve.gold),
                "proxy_fit": coefficients(curve, curve.proxy),
                "highest": highest,
                "fall": down._asdict(),
                "turns": down.high < 0,
            }
        )
    held = {
        size: [read_json(proxy_path(root, size, m) / "summary.json") for m in range(config.members)] for size in proxies
    }
    return {
        "stage": NAME,
        "rater": config.evaluate.rater,
        "prompts": len(gold),
        "samples": gold.shape[1],
        "start": {"path": config.init_from, "gold": average(gold.mean(axis=1))._asdict(), "deviation": deviation(gold)},
        "members": config.members,
        "pessimism": config.pessimism,
        "proxies": [
            {
                "verdicts": size,
                "accuracy": [one["held_out"]["accuracy"] for one in members],
                "held_out_verdicts": members[0]["about"]["held_out_prompts"],
                "seconds": sum(one["seconds"] for one in members),
            }
            for size, members in held.items()
        ],
        "curves": told,
        "ensembles": ensembles(curves, gold, proxies, config) if config.members > 1 else [],
    }


def ensembles(
    curves: Sequence[Curve], gold: np.ndarray, proxies: Mapping[int, np.ndarray], config: ConfigDict
) -> list[dict[str, Any]]:
    """The ensemble's gold score less a single proxy's at the end of each climb, prompt by prompt.

    For best-of-n against each member, so that its interval covers other members too; for PPO, of one run each, it
    covers prompts only.
    """
    found = []
    for size, members in proxies.items():
        n, by = gold.shape[1], together(members, config.pessimism)
        each = [best_of(gold, by, n) - best_of(gold, member, n) for member in members]
        found.append({"method": BEST_OF_N, "verdicts": size, **crossed(np.array(each) / deviation(gold))._asdict()})
        one, several = (
            next(c for c in curves if (c.method, c.verdicts, c.members) == (PPO, size, count))
            for count in (1, len(members))
        )
        found.append({"method": PPO, "verdicts": size, **average(several.gold[-1] - one.gold[-1])._asdict()})
    return found


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was seen, with what may not be concluded."""
    said = []
    for curve in summary["curves"]:
        peak, end, down = curve["gold"][curve["highest"]], curve["gold"][-1], curve["fall"]
        reached = f"{curve['name']}: gold {signed(end['value'])} at the end (distance {curve['distance'][-1]:.1f})"
        if curve["turns"]:
            said.append(
                f"{reached}, highest {signed(peak['value'])} at {curve['distance'][curve['highest']]:.1f}: it turns "
                f"down, by {signed(down['value'])} {interval(down, 'signed')}."
            )
        elif curve["highest"] == len(curve["gold"]) - 1:
            said.append(f"{reached}, its highest: it does not turn down in this range.")
        else:
            said.append(
                f"{reached}, highest {signed(peak['value'])} at {curve['distance'][curve['highest']]:.1f}: whether it "
                f"turns down is inside the noise ({signed(down['value'])} {interval(down, 'signed')})."
            )
    for one in summary["ensembles"]:
        told = "helps" if one["low"] > 0 else "harms" if one["high"] < 0 else "makes no difference outside the noise"
        said.append(
            f"{one['method']}, {one['verdicts']:,} verdicts: at the end the ensemble {told} "
            f"({signed(one['value'])} {interval(one, 'signed')})."
        )
    said.append(
        "Intervals are over prompts. Each climb of PPO is one run, so what another seed would give is not in them."
    )
    return said


def show(summary: Mapping[str, Any]) -> None:
    """Fits and turning points as a table on the terminal, then the sentences."""

    def measured(estimate):
        return f"{signed(estimate['value'])} {interval(estimate, 'signed')}"

    table(
        "proxies on held-out verdicts",
        ["", "accuracy of each"],
        [
            [f"{one['verdicts']:,} verdicts", " ".join(f"{a:.3f}" for a in one["accuracy"])]
            for one in summary["proxies"]
        ],
    )
    for method, form in ((BEST_OF_N, "d (alpha - beta d)"), (PPO, "d (alpha - beta log d)")):
        table(
            f"{method}: gold = {form}, d the square root of the KL; 95 % intervals",
            ["", "alpha", "beta", "peak", "fall at the end"],
            [
                [
                    curve["name"].removeprefix(f"{method}, "),
                    measured(curve["fit"]["alpha"]),
                    measured(curve["fit"]["beta"]),
                    "none" if curve["fit"]["peak"] is None else f"{curve['fit']['peak']:.3g}",
                    measured(curve["fall"]),
                ]
                for curve in summary["curves"]
                if curve["method"] == method
            ],
        )
    for sentence in sentences(summary):
        say(sentence)


def written(root: Path, summary: Mapping[str, Any], curves: Sequence[Curve]) -> list[Path]:
    """The page and the figure beside it, as SVG and PNG."""
    rows = sorted({curve.members for curve in curves})
    size = dict(width=9.0, height=0.6 + 3.0 * len(rows), nrows=len(rows), ncols=2, sharey="col", sharex="col")
    draw = functools.partial(figure, summary, rows)
    page, picture, bitmap = (root / f"{NAME}.{ending}" for ending in ("html", "svg", "png"))
    drawn = svg(draw, **size, squeeze=False)
    text = (
        templates()
        .get_template(f"{NAME}.html.jinja")
        .render(root=root, summary=summary, sentences=sentences(summary), figure=drawn, rows=rows)
    )
    write_text(picture, drawn)
    write_text(page, text)
    bitmap.write_bytes(png(draw, **size, squeeze=False))
    return [page, picture, bitmap]


def figure(summary: Mapping[str, Any], rows: Sequence[int], axes) -> None:
    """Gold and proxy over the distance: best-of-n left, PPO right; one proxy above, the ensemble below."""
    sizes = dict.fromkeys(curve["verdicts"] for curve in summary["curves"])
    colour = dict(zip(sizes, itertools.cycle(COLOURS)))
    for curve in summary["curves"]:
        panel = axes[rows.index(curve["members"]), (BEST_OF_N, PPO).index(curve["method"])]
        d = np.array([0.0, *curve["distance"]])
        gold, low, high, proxy = (
            np.array([0.0, *(one[key] for one in curve[column])])
            for column, key in (("gold", "value"), ("gold", "low"), ("gold", "high"), ("proxy", "value"))
        )
        shown = dict(color=colour[curve["verdicts"]])
        panel.fill_between(d, low, high, alpha=0.15, linewidth=0, **shown)
        panel.plot(d, gold, "-o", linewidth=1.6, markersize=3, **shown)
        panel.plot(d, proxy, "--", linewidth=1.2, **shown)
        fine = np.linspace(0.02, d.max(), 200)
        alpha, beta = (curve["fit"][name]["value"] for name in ("alpha", "beta"))
        panel.plot(fine, np.array([alpha, beta]) @ FORMS[curve["method"]](fine), ":", linewidth=1.4, **shown)
    for row, members in enumerate(rows):
        for column, method in enumerate((BEST_OF_N, PPO)):
            panel = axes[row, column]
            panel.axhline(0, color=INK, linewidth=0.6)
            panel.set_title(f"{method}, {'one proxy' if members == 1 else f'ensemble of {members}'}", fontsize=9)
            if column == 0:
                panel.set_ylabel("gain over the start, in its deviations")
            if row == len(rows) - 1:
                panel.set_xlabel("distance: square root of the KL to the start")
    axes[0, 0].figure.legend(handles=legend(colour), loc="outside right upper", frameon=False, labelcolor=INK)


def legend(colours: Mapping[int, str]) -> list[Line2D]:
    kinds = {"gold": "-", "proxy": "--", "fit of gold": ":"}
    return [
        *(Line2D([], [], color=colour, label=f"{size:,} verdicts") for size, colour in colours.items()),
        *(Line2D([], [], color=INK, linestyle=style, label=kind) for kind, style in kinds.items()),
    ]


def program(argv: list[str]) -> None:
    flags, config = arguments(argv, __doc__, FLAGS)
    run(config, flags.workdir)


if __name__ == "__main__":
    main(program, long=True)
