"""Which algorithm an AReaL file trains with, and its settings that follow from several keys."""

from __future__ import annotations

from lorelei.algo.kinds import DEFAULT, fields_of
from lorelei.areal.file import ArealFile
from lorelei.config.errors import ConfigError
from lorelei.config.section import Raw


def algorithm(file: ArealFile, copied: Raw, kind: object) -> Raw:
    """The section `algo`. copied: what it has already. kind: another than the file's; None: its.

    Raises ConfigError for settings that cannot mean the same here.
    """
    own = _kind(file) if kind is None else kind
    algo = {**copied, **_ratio(file, copied), **_penalty(file), **_divergence(file)}
    algo["reward_norm"] = _norm(file, "actor.reward_norm")
    algo["adv_norm"] = norm = _norm(file, "actor.adv_norm")
    if norm is not None:
        norm["weigh_by"] = "token"
    algo = fields_of(own, algo)
    if kind is None and own != DEFAULT:
        # those of AReaL, and not the defaults of the kind here
        given = fields_of(own, {"eps_clip_higher": None, "loss_aggregation": "token", **algo})
        algo = {"kind": own, **given}
    return algo


def _kind(file: ArealFile) -> str:
    whole = file.value("actor.importance_sampling_level", "token") == "sequence"
    decoupled = file.value("actor.use_decoupled_loss", False)
    if file.value("actor.use_sapo_loss", False):
        if decoupled:
            raise ConfigError(
                "actor.use_sapo_loss: true contradicts actor.use_decoupled_loss: true, in AReaL "
                "too; set the latter to false"
            )
        if whole:
            raise ConfigError(
                "actor.importance_sampling_level: sequence with use_sapo_loss cannot be done here; "
                "use token"
            )
        return "sapo"
    # without the decoupled loss the second moment there is of a difference of 0
    if file.has("actor.m2_threshold") and decoupled:
        minibatches = file.number("actor.ppo_n_minibatches", 4)
        if whole or minibatches > 1:
            key = "importance_sampling_level" if whole else "ppo_n_minibatches"
            allowed = "token" if whole else 1
            raise ConfigError(
                f"actor.{key}: {'sequence' if whole else minibatches} with m2_threshold cannot be "
                f"done here, where M2PO clips nothing; use {allowed}"
            )
        return "m2po"
    return "gspo" if whole else DEFAULT


def _ratio(file: ArealFile, copied: Raw) -> Raw:
    """What the ratio is to, and its bounds."""
    bounds = file.has_section("actor.rejection_sampling") or "rejection_sampling" in copied
    decoupled = file.value("actor.use_decoupled_loss", False)
    recompute = file.value("actor.recompute_logprob", False)
    found: Raw = {"use_decoupled_loss": decoupled and bounds}
    if not bounds or recompute or not decoupled:
        found["recompute_logprob"] = recompute or decoupled
    if not decoupled:
        copied.pop("rejection_sampling", None)  # AReaL does nothing with it then
    elif bounds:
        held = copied["rejection_sampling"]
        held.setdefault("upper", 5.0)
        if held.get("level", "token") == "token":
            held.pop("agg", None)  # nor with that
        elif held.get("agg") == "sum" and held.get("metric", "ratio") == "ratio":
            raise ConfigError(
                "actor.rejection_sampling.agg: sum of ratios weighs by their mean in AReaL, and by "
                "their sum here; use mean"
            )
    return found


def _penalty(file: ArealFile) -> Raw:
    if not file.value("actor.overlong_reward_penalty", False):
        return {}
    keys = {"buffer": "overlong_tokens", "factor": "overlong_penalty_factor"}
    for key in keys.values():
        if not file.has(f"actor.{key}"):
            raise ConfigError(f"actor.{key}: is required with actor.overlong_reward_penalty: true")
    return {"overlong_penalty": {ours: file.number(f"actor.{k}") for ours, k in keys.items()}}


def _divergence(file: ArealFile) -> Raw:
    weight = file.number("actor.kl_ctl", 0.1)
    if weight <= 0:
        return {}
    bounds = file.has_section("actor.rejection_sampling") or any(
        file.has(f"actor.{key}") for key in ("behave_imp_weight_cap", "behav_imp_weight_cap")
    )
    if file.value("actor.use_decoupled_loss", False) and not bounds:
        raise ConfigError(
            f"actor.kl_ctl: {weight} with use_decoupled_loss and no rejection_sampling "
            "rewards the sampler's log-probabilities and trains on the trainer's, which "
            "cannot be done here; give actor.rejection_sampling={upper: 5.0}"
        )
    estimator = file.value("actor.kl_estimator", "k1")
    return {"kl_estimator": estimator, "use_kl_in_reward": True}


def _norm(file: ArealFile, key: str) -> Raw | None:
    if not file.has_section(key):
        return None
    levels = (file.values.get(f"{key}.{k}", "batch") for k in ("mean_level", "std_level"))
    mean, std = ("none" if level is None else level for level in levels)
    found: Raw = {"mean_level": mean, "std_level": std}
    leaves_out = file.value(f"{key}.mean_leave1out", False) and mean != "none"
    if leaves_out:
        found["mean_leave1out"] = True
    if std != "none":
        found["std_unbiased"] = file.value(f"{key}.std_unbiased", True)
        found["eps"] = file.number(f"{key}.eps", 1e-5)
        if leaves_out or mean != std:
            found["std_around"] = "subtracted_mean"
    return found
