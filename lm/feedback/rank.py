"""Lets people rank the answers of models on a web page.

    python -m lm rank --workdir=runs/people --prompts=prompts.txt --models=runs/quickstart
    python -m lm rank --workdir=runs/people --results

The models answer your prompts, the page shows the answers side by side, and WORKDIR/people.db stores answers and
verdicts. The same command continues where it stopped; without --prompts the page shows the answers that are there.
Stage `reward` trains on the verdicts: --config.data.rankings=WORKDIR/people.db.
"""

import argparse
import itertools
import secrets
import socket
import webbrowser
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import jax
import numpy as np
import uvicorn

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.statistics import estimate_text
from lm.data.annotations import PEOPLE_DB, AnnotationStore, read_rankings
from lm.data.conversations import reward_example
from lm.data.preferences import ranking_json
from lm.feedback import prompt_file, results
from lm.feedback.answering_models import AnsweringModel, answer_prompts
from lm.feedback.app import checked_rater_name, make_app
from lm.feedback.web import LOOPBACK_HOSTS, open_socket, server_address
from lm.generate.sampler import SamplingParams
from lm.rewards.load import check_same_axes, load_reward_model
from lm.runs.console import on_sigterm, print_table, run_program, say, warn
from lm.runs.workdir import CHECKPOINTS_DIR, PIPELINE_FILE, load_trained_model, write_text
from lm.train.warm_start import policy_folder

RESULTS_FILE = "results.html"
PAGE_TITLE = "Which answer is better?"
FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help="where answers and verdicts are kept"),
    "prompts": dict(metavar="FILE", help='.txt, a prompt a line, or .jsonl: {"prompt": text or messages}'),
    "models": dict(metavar="DIR,...", help="who answers, also as NAME=DIR; default: the model in --workdir"),
    "responses": dict(type=int, default=2, help="answers to a prompt, 2 to 5; the models take turns; default: 2"),
    "max_new_tokens": dict(type=int, default=48, help="the longest answer; default: 48"),
    "temperature": dict(type=float, default=1.0, help="0 always takes the likeliest token; default: 1"),
    "top_k": dict(type=int, default=0, help="sample among the k likeliest tokens only; default: 0, all"),
    "top_p": dict(type=float, default=1.0, help="among the likeliest whose probability reaches p; default: 1"),
    "seed": dict(type=int, default=0, help="the same seed gives the same answers; default: 0"),
    "reward": dict(metavar="DIR,...", help="reward models: items that they are least sure of come first"),
    "raters": dict(default="", metavar="NAME,...", help="who may rank; default: anybody"),
    "host": dict(
        default=LOOPBACK_HOSTS[0], help="0.0.0.0 admits other machines, by a secret address; default: this one only"
    ),
    "port": dict(type=int, default=8000, help="0 takes a free one; default: 8000"),
    "open": dict(action="store_true", help="open the page in a browser"),
    "import": dict(dest="source", metavar="FILE", help="add the verdicts of a .jsonl or .db file, and stop"),
    "export": dict(metavar="FILE", help="write all verdicts as JSON lines, and stop"),
    "results": dict(action="store_true", help=f"print the results, write WORKDIR/{RESULTS_FILE}, and stop"),
}


def load_answering_models(flags: argparse.Namespace) -> list[AnsweringModel]:
    """The models that answer."""
    if not 2 <= flags.responses <= 5:
        raise UserError(f"responses is {flags.responses}; it must be from 2 to 5")
    sampling = SamplingParams(flags.max_new_tokens, flags.temperature, top_k=flags.top_k, top_p=flags.top_p)
    return [
        AnsweringModel(
            name, load_trained_model(folder, backend=jax.default_backend(), warn=warn), sampling, seed=flags.seed
        )
        for name, folder in model_folders(flags).items()
    ]


def model_folders(flags: argparse.Namespace) -> dict[str, Path]:
    """The workdir of each model that answers, by name; a pipeline's folder means its last policy."""
    if not flags.models and not any((Path(flags.workdir) / name).exists() for name in (PIPELINE_FILE, CHECKPOINTS_DIR)):
        raise UserError(f"there is no model in {flags.workdir}: name those that answer, --models=DIR,DIR")
    folders: dict[str, Path] = {}
    for part in (flags.models or flags.workdir).split(","):
        name, _, path = part.strip().rpartition("=")
        if not path:
            raise UserError(f"--models={flags.models} names no folder: give those of trained models")
        folder = policy_folder(Path(path))
        name = name or folder.resolve().name
        if name in folders:
            raise UserError(f"two models are called {name}: tell them apart, --models=NAME=DIR,NAME=DIR")
        folders[name] = folder
    return folders


def prioritise_items(store: AnnotationStore, paths: str) -> None:
    """Puts the items first that the reward models are least sure of, or disagree on."""
    loaded = [
        load_reward_model(path.strip(), backend=jax.default_backend(), normalized=False, jit=jax.jit, warn=warn)
        for path in paths.split(",")
    ]
    check_same_axes([trained for trained, _ in loaded])
    judges = [judge for _, judge in loaded]
    items = store.items()
    examples = [reward_example(item.prompt) for item in items for _ in item.responses]
    texts = [text for item in items for text in item.responses]
    scores = np.stack([judge(examples, texts) for judge in judges])
    ends = np.cumsum([len(item.responses) for item in items])
    store.set_priorities(
        {item.id: reward_uncertainty(each) for item, each in zip(items, np.split(scores, ends[:-1], axis=1))}
    )


def reward_uncertainty(scores: np.ndarray) -> float:
    """The mean over pairs of responses of p (1 - p), with p the mean over models of sigmoid(score difference).

    scores: f[models, responses]. p (1 - p) of the mean is the mean of p (1 - p) plus the variance of p, so this counts
    both how unsure each model is and how far they disagree.
    """
    pairs = itertools.combinations(scores.T, 2)
    p = np.array([np.mean(1 / (1 + np.exp(b - a))) for a, b in pairs])
    return float(np.mean(p * (1 - p)))


def serve_page(
    store: AnnotationStore, flags: argparse.Namespace, raters: Sequence[str], listening: socket.socket
) -> None:
    """Shows the page until ctrl-C or SIGTERM."""
    local = flags.host in LOOPBACK_HOSTS
    token = "" if local else secrets.token_urlsafe()
    app = make_app(store, title=PAGE_TITLE, raters=raters, token=token, hosts=LOOPBACK_HOSTS if local else ())
    base = server_address(flags.host, listening)
    secret = f"?token={token}" if token else ""
    say(f"rank at {base}{secret} ({len(store.items())} items; ctrl-C stops)")
    say(f"results: {base}results{secret}")
    say(f"verdicts are kept in {store.path}; to learn from them:")
    say(
        f"  python -m lm train --config=experiments/reward.py --workdir={store.path.parent / 'people_reward'} "
        f"--config.init_from=DIR --config.data.rankings={store.path}"
    )
    if flags.open:
        webbrowser.open(base + secret)
    # log_config: uvicorn's own closes the handlers of other libraries, and stderr with them.
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off", timeout_graceful_shutdown=3)
    )
    with on_sigterm(), suppress(KeyboardInterrupt):  # the server stops by itself, then raises the signal again
        server.run(sockets=[listening])
    say(f"stopped: {len(store.rankings())} verdicts in {store.path}")


def export_rankings(store: AnnotationStore, path: Path) -> None:
    """Writes every verdict to a new file."""
    if path.exists():
        raise UserError(f"{path} exists: name a new file to export to")
    rankings = store.rankings()
    write_text(path, "".join(f"{ranking_json(ranking)}\n" for ranking in rankings))
    say(f"{len(rankings)} verdicts exported to {path}")


def report_results(store: AnnotationStore) -> None:
    rankings = store.rankings()
    ranking_summary = results.ranking_results(rankings)
    counts = [
        [r.name, r.verdicts, r.ties, r.both_bad, r.skipped, "–" if r.seconds is None else r.seconds]
        for r in ranking_summary.raters
    ]
    print_table("", ("rater", "verdicts", "ties", "both bad", "skipped", "median seconds"), counts)
    biases = [
        [r.name, estimate_text(r.first_shown_preferred, "percent"), estimate_text(r.reliability, "percent")]
        for r in ranking_summary.raters
    ]
    print_table("", ("rater", "first shown preferred", "with the majority"), biases)
    strengths = [
        [model.name, model.responses, estimate_text(model.strength, "signed")] for model in ranking_summary.models
    ]
    print_table("", ("model", "answers", "log-strength"), strengths)
    say(f"Krippendorff's alpha: {estimate_text(ranking_summary.alpha, 'signed')}")
    write_text(store.path.parent / RESULTS_FILE, results.results_page(rankings, title=PAGE_TITLE))
    say(f"results: {store.path.parent / RESULTS_FILE}")


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    path = Path(flags.workdir) / PEOPLE_DB
    if not (path.exists() or flags.prompts or flags.source):
        raise UserError(f"there is no {path} yet: give --prompts=FILE to have them answered, or --import=FILE")
    stops = flags.source or flags.export or flags.results
    # Errors in these show before a database is made and before a model answers.
    raters = [checked_rater_name(name.strip(), ()) for name in flags.raters.split(",")] if flags.raters else []
    prompts = prompt_file.read_prompts(flags.prompts, warn) if flags.prompts else []
    answering = load_answering_models(flags) if prompts else []
    brought = read_rankings(flags.source) if flags.source else []
    with nullcontext() if stops else open_socket(flags.host, flags.port) as listening, AnnotationStore(path) as store:
        if flags.source:
            added, there = store.merge_rankings(brought)
            say(f"{added} verdicts imported into {path}, {there} were there already")
        if prompts:
            answer_prompts(store, answering, prompts, count=flags.responses, seed=flags.seed)
        if flags.export:
            export_rankings(store, Path(flags.export))
        if flags.results:
            report_results(store)
        if not stops:
            if not store.items():
                raise UserError(f"there is nothing to rank in {path}: give --prompts=FILE, or --import=FILE")
            if flags.reward:
                prioritise_items(store, flags.reward)
            serve_page(store, flags, raters, listening)


if __name__ == "__main__":
    run_program(program)
