"""TRL's numbers on small arrays, which tests/stages/test_trl.py holds our losses to.

    python tests/peers/make.py      where requirements.txt and tests/peers.txt are installed: writes fixtures.json anew

Every number is computed by TRL's own code. A loss that is a method of a trainer is called as that: on a trainer without
its `__init__`, which has the attributes that the method reads and no more, and with a model that finds the given
log-probs. What TRL keeps inside a longer function (PPO's loop, the advantages of GRPO and RLOO) is cut out of the
installed source and executed: `lines`. In float64, so that every machine gets the same numbers.
"""

import collections
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # its experimental trainers warn on import

import numpy as np
import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo.ppo_trainer import masked_whiten
from trl.rewards import get_soft_overlong_punishment

FIXTURES = Path(__file__).with_name("fixtures.json")
PINNED = ("torch", "trl", "transformers")
GROUP = 4  # answers to a prompt
LENGTHS = (6, 1, 3, 5, 2, 6, 4, 1)  # of the rows: two groups, or four chosen answers and then the four rejected ones
T, V = max(LENGTHS), 5

Arrays = Mapping[str, torch.Tensor]


def inputs() -> dict[str, list]:
    """Seeded arrays, four decimals each. Beyond a row's length they hold numbers too: a mask has to work."""
    rng = np.random.default_rng(0)
    B = len(LENGTHS)
    normal = lambda scale, *shape: rng.normal(scale=scale, size=shape)
    old = -rng.uniform(0.8, 3.0, size=(B, T))
    old_values = normal(1.0, B, T)
    arrays = {
        "weights": (np.arange(T) < np.array(LENGTHS)[:, None]).astype(float),
        "old_logprobs": old,
        "logprobs": np.minimum(old + normal(0.4, B, T), -0.05),
        "ref_logprobs": np.minimum(old + normal(0.4, B, T) - 0.2, -0.05),
        "advantages": normal(1.0, B),  # of answers
        "rewards": np.append(normal(1.0, GROUP), np.full(B - GROUP, 0.7)),  # the second group is all equal
        "token_advantages": normal(1.0, B, T),
        "old_values": old_values,
        "values": old_values + normal(0.3, B, T),
        "returns": old_values + normal(1.0, B, T),
        "scores": normal(1.0, B),  # of a reward model, chosen then rejected
        "margin": rng.uniform(0.0, 1.0, size=B // 2),
        "student_logits": normal(1.5, 2, T, V),
        "teacher_logits": normal(1.5, 2, T, V),
    }
    return {name: np.round(array, 4).tolist() for name, array in arrays.items()}


ALONE = SimpleNamespace(  # an accelerator of one process: what it gathers is what there is
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def trainer(kind: type, **attributes):
    """A trainer of that class whose `__init__` never ran, with these attributes and those that all of them read."""
    made = kind.__new__(kind)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    common = {"accelerator": ALONE, "model": model, "aux_loss_enabled": False, "_total_train_tokens": 0}
    vars(made).update(common | {"_metrics": collections.defaultdict(lambda: collections.defaultdict(list))})
    vars(made).update(attributes)
    return made


def lines(function: Callable, first: str, last: str, **names) -> dict:
    """All names after the lines of a function's source were run, from the one that starts with `first` to `last`."""
    source = inspect.getsource(function).splitlines()
    starts = [i for i, line in enumerate(source) if line.lstrip().startswith(first)]
    ends = [i for i, line in enumerate(source) if line.lstrip().startswith(last)]
    start = starts[0]
    end = next(i for i in ends if i >= start)
    names = {**inspect.unwrap(function).__globals__, **names}
    exec(textwrap.dedent("\n".join(source[start : end + 1])), names)
    return names


def knows(logprobs: torch.Tensor) -> Callable:
    """A model that finds `logprobs` f[B,T] for targets of id 0. Its vocabulary is the target and anything else."""
    logits = torch.stack([logprobs, torch.log1p(-torch.exp(logprobs))], dim=-1)
    shifted = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # what the last token predicts is nobody's target
    return lambda *args, **kwargs: SimpleNamespace(logits=shifted)


def sequences(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of a prompt of one token and the answer's `weights`, all ids 0, as TRL's collators lay them out."""
    completion = torch.nn.functional.pad(weights.long(), (1, 0))
    attention = torch.nn.functional.pad(weights.long(), (1, 0), value=1)
    return {"input_ids": torch.zeros_like(completion), "completion_mask": completion, "attention_mask": attention}


def grpo(a: Arrays, *, loss_type: str, low=0.2, high=0.2, beta=0.0, delta=None, level="token") -> torch.Tensor:
    """GRPOTrainer._compute_loss: every loss type, the two-sided clip, k3 and the ratios of whole answers."""
    w = a["weights"]
    learner = trainer(
        GRPOTrainer,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (a["logprobs"], torch.zeros_like(w), None),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        importance_sampling_level=level,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=T,
        _entropy_bonus_enabled=False,
    )
    ids = torch.zeros_like(w, dtype=torch.long)
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": w}
    batch |= {"old_per_token_logps": a["old_logprobs"], "ref_per_token_logps": a["ref_logprobs"]}
    return learner._compute_loss(None, batch | {"advantages": a["advantages"], "num_items_in_batch": w.sum()})


def rloo(a: Arrays) -> torch.Tensor:
    """RLOOTrainer._compute_loss: an answer is one action, its log-prob the sum over its tokens."""
    w = a["weights"]
    learner = trainer(
        RLOOTrainer,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (a["logprobs"], torch.zeros_like(w), None),
        epsilon_low=0.2,
        epsilon_high=0.2,
    )
    ids = torch.zeros_like(w, dtype=torch.long)
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": w}
    old = (a["old_logprobs"] * w).sum(1)
    return learner._compute_loss(None, batch | {"old_logps": old, "advantages": a["advantages"]})


def grpo_advantages(a: Arrays, *, scale: str) -> torch.Tensor:
    """The lines of GRPOTrainer._generate_and_score_completions between rewards and advantages."""
    learner = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1)
    )
    return lines(
        GRPOTrainer._generate_and_score_completions,
        "unscorable_mask =",
        "advantages = torch.nan_to_num(",
        self=learner,
        rewards_per_func=a["rewards"][:, None],
        num_generations=GROUP,
        device=ALONE.device,
    )["advantages"]


def rloo_advantages(a: Arrays, *, beta: float) -> torch.Tensor:
    """The lines of RLOOTrainer._generate_and_score_completions between rewards and advantages, k1 in the reward."""
    learner = SimpleNamespace(
        reward_weights=torch.ones(1), reward_clip_range=None, beta=beta, normalize_advantages=False, accelerator=ALONE
    )
    return lines(
        RLOOTrainer._generate_and_score_completions,
        "unscorable_mask =",
        "advantages = torch.nan_to_num(",
        self=learner,
        rewards_per_func=a["rewards"][:, None],
        num_generations=GROUP,
        old_per_token_logps=a["old_logprobs"],
        ref_per_token_logps=a["ref_logprobs"],
        completion_mask=a["weights"],
        device=ALONE.device,
        gather=ALONE.gather,
    )["advantages"]


def ppo_rollout(a: Arrays, *, estimator: str = "k1", gamma: float = 1.0) -> dict:
    """The lines of PPOTrainer.train from log-probs, values and scores to whitened advantages and returns."""
    args = SimpleNamespace(kl_estimator=estimator, kl_coef=0.05, whiten_rewards=False, gamma=gamma, lam=0.95)
    return lines(
        PPOTrainer.train,
        "response_idxs =",
        "advantages = torch.masked_fill(",
        args=args,
        responses=torch.zeros_like(a["weights"]),
        sequence_lengths=a["weights"].sum(1).long() - 1,  # TRL's is the position of the last token
        logprobs=a["old_logprobs"],
        ref_logprobs=a["ref_logprobs"],
        values=a["old_values"],
        scores=a["rewards"],
    )


def ppo(a: Arrays) -> torch.Tensor:
    """The lines of PPOTrainer.train from new log-probs and values to the loss, on what `ppo_rollout` leaves."""
    known = ppo_rollout({name: array.detach() for name, array in a.items()})
    everything = torch.arange(len(LENGTHS))
    return lines(
        PPOTrainer.train,
        "new_logprobs = torch.masked_fill(",
        "loss =",
        args=SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1),
        padding_mask=known["padding_mask"],
        padding_mask_p1=known["padding_mask_p1"],
        micro_batch_inds=everything,
        new_logprobs=a["logprobs"],
        mb_logprobs=known["logprobs"],
        mb_advantage=known["advantages"],
        mb_return=known["returns"],
        mb_values=known["values"],
        vpred_temp=torch.nn.functional.pad(a["values"], (0, 1))[:, :, None],
        context_length=1,
    )["loss"]


def dpo(a: Arrays, *, loss_type: str, beta=0.1, smoothing=0.0, pairs=slice(None)) -> torch.Tensor:
    """DPOTrainer._compute_loss on [chosen, rejected], of some of the pairs."""
    chosen = torch.arange(len(LENGTHS) // 2)[pairs]
    rows = torch.cat([chosen, chosen + len(LENGTHS) // 2])
    learner = trainer(
        DPOTrainer,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=knows(a["ref_logprobs"][rows]),
        precompute_ref_logps=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    return learner._compute_loss(knows(a["logprobs"][rows]), sequences(a["weights"][rows]), return_outputs=False)


def cdpo(a: Arrays, *, beta: float, smoothing: float) -> torch.Tensor:
    """Conservative DPO: TRL's loss type "aot", which first sorts the log-ratios of a batch, of one pair at a time."""
    each = [dpo(a, loss_type="aot", beta=beta, smoothing=smoothing, pairs=[i]) for i in range(len(LENGTHS) // 2)]
    return torch.stack(each).mean()


def kto(a: Arrays) -> torch.Tensor:
    """KTOTrainer._compute_loss. Its mismatched answers, for the KL, are the first four rows with the old log-probs."""
    w, half = a["weights"], len(LENGTHS) // 2
    model, reference = knows(a["logprobs"]), knows(a["ref_logprobs"])
    mismatched = {
        net: (a[name] * w)[:half].sum(1) for net, name in ((model, "old_logprobs"), (reference, "ref_logprobs"))
    }
    learner = trainer(
        KTOTrainer,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _compute_kl_logps=lambda net, batch: mismatched[net],
        ref_model=reference,
        precompute_ref_logps=False,
        calculate_KL=True,
        loss_type="kto",
        beta=0.5,
        desirable_weight=1.0,
        undesirable_weight=1.2,
    )
    label = torch.arange(len(w)) < half
    return learner._compute_loss(model, sequences(w) | {"label": label}, return_outputs=False)


def orpo(a: Arrays) -> torch.Tensor:
    """ORPOTrainer.get_batch_loss_metrics: the odds-ratio loss and the chosen answers' cross entropy."""
    rows = sequences(a["weights"])
    rows["labels"] = torch.where(rows.pop("completion_mask") == 1, 0, -100)
    half = len(LENGTHS) // 2
    batch = {f"chosen_{name}": x[:half] for name, x in rows.items()}
    batch |= {f"rejected_{name}": x[half:] for name, x in rows.items()}
    learner = trainer(ORPOTrainer, is_encoder_decoder=False, padding_value=0, beta=0.25)
    return learner.get_batch_loss_metrics(knows(a["logprobs"]), batch)[0]


def simpo(a: Arrays) -> torch.Tensor:
    """CPOTrainer.get_batch_logps, then CPOTrainer.cpo_loss with loss type "simpo"."""
    labels = torch.where(sequences(a["weights"])["completion_mask"] == 1, 0, -100)
    means = CPOTrainer.get_batch_logps(knows(a["logprobs"])().logits, labels, average_log_prob=True)
    learner = trainer(CPOTrainer, alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.0)
    return learner.cpo_loss(*means.chunk(2))[0].mean()


def reward(a: Arrays, *, margin: torch.Tensor | None = None, centring: float | None = None) -> torch.Tensor:
    """RewardTrainer.compute_loss on the scores of [chosen, rejected]."""
    learner = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centring))
    batch = {"attention_mask": torch.ones(len(LENGTHS), 1)} | ({} if margin is None else {"margin": margin})
    return learner.compute_loss(lambda **kwargs: SimpleNamespace(logits=a["scores"][:, None]), batch)


def gkd(a: Arrays, *, beta: float, temperature: float = 1.0) -> torch.Tensor:
    """GKDTrainer.generalized_jsd_loss over the first two rows' tokens."""
    labels = torch.where(a["weights"][:2] > 0, 0, -100)
    return GKDTrainer.generalized_jsd_loss(
        a["student_logits"], a["teacher_logits"], labels=labels, beta=beta, temperature=temperature
    )


# case: (scalar loss of the arrays, what it is differentiated by)
LOSSES: Mapping[str, tuple[Callable[[Arrays], torch.Tensor], tuple[str, ...]]] = {
    "grpo": (lambda a: grpo(a, loss_type="grpo"), ("logprobs",)),
    "grpo with k3": (lambda a: grpo(a, loss_type="grpo", beta=0.04), ("logprobs",)),
    "dapo": (lambda a: grpo(a, loss_type="dapo", high=0.28), ("logprobs",)),
    "bnpo with k3": (lambda a: grpo(a, loss_type="bnpo", beta=0.04), ("logprobs",)),
    "dr_grpo": (lambda a: grpo(a, loss_type="dr_grpo"), ("logprobs",)),
    "dual clip": (lambda a: grpo(a, loss_type="dapo", delta=1.3), ("logprobs",)),
    "gspo": (lambda a: grpo(a, loss_type="grpo", low=0.1, high=0.15, level="sequence"), ("logprobs",)),
    "cispo": (lambda a: grpo(a, loss_type="cispo", high=1.3), ("logprobs",)),
    "rloo": (rloo, ("logprobs",)),
    "ppo": (ppo, ("logprobs", "values")),
    "dpo": (lambda a: dpo(a, loss_type="sigmoid"), ("logprobs",)),
    "dpo with smoothing": (lambda a: cdpo(a, beta=0.3, smoothing=0.1), ("logprobs",)),
    "ipo": (lambda a: dpo(a, loss_type="ipo", beta=0.5), ("logprobs",)),
    "kto": (kto, ("logprobs",)),
    "orpo": (orpo, ("logprobs",)),
    "simpo": (simpo, ("logprobs",)),
    "reward": (reward, ("scores",)),
    "reward with margins": (lambda a: reward(a, margin=a["margin"]), ("scores",)),
    "reward with one margin and centring": (
        lambda a: reward(a, margin=torch.tensor(0.4, dtype=torch.float64), centring=0.05),
        ("scores",),
    ),
    "gkd, forward": (lambda a: gkd(a, beta=0.0), ("student_logits",)),
    "gkd, 0.5": (lambda a: gkd(a, beta=0.5), ("student_logits",)),
    "gkd, 0.2 at temperature 2": (lambda a: gkd(a, beta=0.2, temperature=2.0), ("student_logits",)),
    "gkd, reverse": (lambda a: gkd(a, beta=1.0), ("student_logits",)),
}

# case: learning signals, arrays by name
SIGNALS: Mapping[str, Callable[[Arrays], dict[str, torch.Tensor]]] = {
    "standardised": lambda a: {"advantages": grpo_advantages(a, scale="group")},
    "centred": lambda a: {"advantages": grpo_advantages(a, scale="none")},
    "leave one out": lambda a: {"advantages": rloo_advantages(a, beta=0.0)},
    "leave one out, k1 in the reward": lambda a: {"advantages": rloo_advantages(a, beta=0.05)},
    "whiten": lambda a: {"whitened": masked_whiten(a["token_advantages"], a["weights"] > 0) * a["weights"]},
    "ppo": lambda a: signal(ppo_rollout(a)),
    "ppo, k3 in the reward, gamma 0.9": lambda a: signal(ppo_rollout(a, estimator="k3", gamma=0.9)),
    "overlong": lambda a: {
        "penalties": torch.tensor(get_soft_overlong_punishment(5, 4)([[0] * n for n in LENGTHS]), dtype=torch.float64)
    },
}


def signal(rollout: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What PPO learns from, 0 where TRL has no token or leaves what nobody reads."""
    returns = rollout["returns"] * ~rollout["padding_mask_p1"]
    return {"rewards": rollout["rewards"] * ~rollout["padding_mask_p1"], "advantages": rollout["advantages"]} | {
        "returns": returns
    }


def numbers(given: Mapping[str, list]) -> dict[str, dict]:
    """{"losses": {case: {"loss", gradients by name}}, "signals": {case: arrays by name}} of the arrays `given`."""
    arrays = {name: torch.tensor(array, dtype=torch.float64) for name, array in given.items()}
    losses = {}
    for case, (loss, by) in LOSSES.items():
        moved = {name: arrays[name].clone().requires_grad_() for name in by}
        value = loss(arrays | moved)
        gradients = torch.autograd.grad(value, list(moved.values()))
        losses[case] = {"loss": value, **dict(zip(moved, gradients))}
    signals = {case: of(arrays) for case, of in SIGNALS.items()}
    found = {"losses": losses, "signals": signals}
    return {
        kind: {case: {name: rounded(x.detach().tolist()) for name, x in of.items()} for case, of in cases.items()}
        for kind, cases in found.items()
    }


def rounded(tree):
    """Nine significant digits: more than float32 holds."""
    return [rounded(x) for x in tree] if isinstance(tree, list) else float(f"{tree:.9g}")


def written(tree, indent: str = "") -> str:
    """JSON with every array on a line of its own."""
    if not isinstance(tree, dict):
        return json.dumps(tree)
    inner = indent + " "
    entries = [f"{inner}{json.dumps(key)}: {written(value, inner)}" for key, value in tree.items()]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


if __name__ == "__main__":
    given = inputs()
    versions = {name: metadata.version(name).partition("+")[0] for name in PINNED}
    FIXTURES.write_text(written({"versions": versions, "inputs": given, **numbers(given)}) + "\n")
    print(f"wrote {FIXTURES}, {FIXTURES.stat().st_size} bytes")
