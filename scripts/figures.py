#!/usr/bin/env python3
"""derivation.md's three figures, and its numbers on the natural scale of alpha.

    python scripts/figures.py            prints (8f)'s numbers and draws scripts/figures/*.svg (needs matplotlib)

What is drawn is computed here from the functions of tgdpo.py and explain.py, in float64.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from explain import along, f64, language, probability, sequences, soft_optimum
from tgdpo import closed_form_policy, tgdpo_loss, token_rewards

GREY, BLUE, RED = "#888888", "#1f5fa8", "#c0392b"


# ---------------------------------------------------------------------------------------- the natural scale of alpha
def expected_force(weights, rhat, beta, alpha, tree):
    """The mean force on each log π(a|s) at π = π_ref: weights (Y, Y), how often y (row) is chosen over y', and r̂
    (S, A) -> the labels' part and r̂'s part, (S, A) each."""
    states, actions = tree
    here = torch.arange(len(states))[:, None].expand_as(states)
    n = torch.zeros(len(states), *rhat.shape, dtype=rhat.dtype)                         # n(y; s, a), (Y, S, A)
    n[here[states >= 0], states[states >= 0], actions[states >= 0]] = 1.0
    won, lost = [torch.einsum("y,ysa->sa", weights.sum(side), n) for side in (1, 0)]    # E[n_w], E[n_l], (S, A)
    # (8f)  E[ -∂L/∂log π(a|s) ] = β/2 [ μ + 2 α ν r̂ ],   μ = E[n_w - n_l],  ν = E[n_w + n_l] / 2
    mu, nu = won - lost, (won + lost) / 2
    return beta / 2 * mu, beta / 2 * 2 * alpha * nu * rhat


def on_logits(force, ref_logps):
    """What a force on the log π(a|s) is on the logits of the same state: softmax takes a share of the sum away."""
    return force - ref_logps.exp() * force.sum(-1, keepdim=True)


def calibrated_force(ref_logps, reward, beta, alpha, tree):
    """What the mean force on each logit tends to for small rewards, r̂ that of an exact DPO model -> (S, A)."""
    R, p, on = along(reward, tree).sum(-1), probability(ref_logps, tree), tree[0] >= 0
    nu, sums = torch.zeros_like(ref_logps), torch.zeros_like(ref_logps)                 # visits; visits times R
    for table, value in ((nu, p), (sums, p * R)):
        table.index_put_((tree[0][on], tree[1][on]), value[:, None].expand_as(on)[on], accumulate=True)
    # (8g)  on a logit about β/2 ν (1 + 2 α) A,   A = E[R|s,a] - E[R|s]
    return beta / 2 * (1 + 2 * alpha) * nu * (sums / nu - sums.sum(-1, keepdim=True) / nu.sum(-1, keepdim=True))


def independent_pairs(ref_logps, reward, tree):
    """How often y beats y' if both are drawn from the reference, equal ones too, labelled by (3b) -> (Y, Y)."""
    p, R = probability(ref_logps, tree), along(reward, tree).sum(-1)
    return 2 * p[:, None] * p * torch.sigmoid(R[:, None] - R)


def scale(size, beta, alpha=0.5, seed=1):
    """At rewards times size: the sum of |r̂'s push| over that of |the labels'|, on logits, r̂ an exact DPO model's; and
    how far the whole force is from (8g), relative to it."""
    ref, reward, tree = language(seed)
    rhat = token_rewards(soft_optimum(ref, size * reward, beta)[0], ref, beta)
    parts = expected_force(independent_pairs(ref, size * reward, tree), rhat, beta, alpha, tree)
    labels, push = [on_logits(part, ref) for part in parts]
    limit = calibrated_force(ref, size * reward, beta, alpha, tree)
    return (push.abs().sum() / labels.abs().sum()).item(), ((labels + push - limit).norm() / limit.norm()).item()


# ------------------------------------------------------------------------------------------------ what is drawn
def two_steps():
    """Two tokens of reference probability 1/2 at each of two steps; behind the first of them every token earns 1."""
    ref, reward = torch.full((3, 2), 0.5).double().log(), f64([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    exact, V, _ = soft_optimum(ref, reward, 1.0)
    myopic, log_Z = closed_form_policy(ref, reward, 1.0)
    return SimpleNamespace(ref=ref, reward=reward, tree=sequences(2, 2), exact=exact, V=V, myopic=myopic, log_Z=log_Z)


def forces(rhats=(0.6, 3.0), alpha=0.5):
    """{(response, sign of r̂): a token's force in DPO and in TGDPO for each |r̂|}, β 1, π = π_ref, by autograd."""
    zero, found = torch.zeros(1, 1).double(), {}
    for sign in (+1, -1):
        for r in (0.0, *rhats):
            logps = torch.zeros(2, 1, 1).double().requires_grad_()
            tgdpo_loss(*logps, zero, zero, zero + sign * r, zero + sign * r, 1.0, alpha)[0].sum().backward()
            for name, gradient in zip(("chosen", "rejected"), logps.grad):
                found.setdefault((name, sign), []).append(-gradient.item())
    return found


def nats(alphas=(0.0, 0.1, 0.5), lost=range(0, 101, 2)):
    """Section 10's example of a token c that was never sampled: {α: the loss when a and b lose so many nats to c}."""
    ref = f64([0.4, 0.4, 0.2]).log()
    dpo = (ref + f64([0.5, -0.5, 0.0]) * f64(3.0).log()).log_softmax(-1)
    rhat, weights = token_rewards(dpo, ref, 1.0), f64([0.75, 0.25])

    def loss(policy, alpha):
        pairs = [table[order, None] for table in (policy, ref, rhat) for order in ([0, 1], [1, 0])]     # (2, 1) each
        return (weights * tgdpo_loss(*pairs, 1.0, alpha)[0]).sum().item()
    return list(lost), {alpha: [loss(dpo - n * f64([1.0, 1.0, 0.0]), alpha) for n in lost] for alpha in alphas}


def draw_tree(plt):
    """The two-step tree: V in each state; on each of the first two edges the myopic and the exact probability."""
    w, (figure, ax) = two_steps(), plt.subplots(figsize=(6.4, 2.7))
    places = [(0, 0), (1, 1), (1, -1)]
    for state, (x, y) in enumerate(places):
        for a in range(2):
            to = places[1 + a] if state == 0 else (2, y + (0.45, -0.45)[a])
            ax.plot([x, to[0]], [y, to[1]], color=GREY, lw=1.5, zorder=0)
            if state:
                ax.text(2.04, to[1], f"r = {w.reward[state, a]:.0f}", va="center")
            else:
                ax.text(0.62, (0.36, -0.36)[a], "r = 0", va="center", color=GREY)
                chances = [p[0, a].exp().item() for p in (w.myopic, w.exact)]
                for chance, name, color, up in zip(chances, ("myopic", "exact"), (RED, BLUE), (0.66, 0.30)):
                    ax.text(0.42, (0.42 + up, -0.62 - up)[a], f"{name} {chance:.2f}", color=color, ha="right")
        ax.text(x, y, f"V = {w.V[state]:.2f}\nlog Z = {w.log_Z[state]:.2f}", ha="center", va="center",
                bbox=dict(boxstyle="round", fc="white", ec="black"))
    ax.set(xlim=(-0.25, 2.3), ylim=(-1.6, 1.6))
    ax.axis("off")
    return figure


def draw_forces(plt):
    """The 2 x 2 of forces on a token, β = 1, α = 1/2, π = π_ref."""
    figure, axes = plt.subplots(2, 2, figsize=(6.4, 3.4), sharey=True)
    found = forces()
    for row, name in enumerate(("chosen", "rejected")):
        for column, sign in enumerate((+1, -1)):
            ax, values = axes[row, column], found[name, sign]
            ax.bar(range(3), values, color=[GREY, BLUE, BLUE], width=0.6)
            for x, value in enumerate(values):
                ax.text(x, value + (0.08 if value > 0 else -0.08), f"{value:+.2f}", ha="center",
                        va="bottom" if value > 0 else "top")
            ax.axhline(0, color="black", lw=0.8)
            ax.set_title(f"{name}, the token looks {'good' if sign > 0 else 'bad'}", fontsize=10)
            for x, label in enumerate(["DPO"] + [f"r̂ = {sign * r:+.1f}" for r in (0.6, 3.0)]):
                ax.text(x, -2.1, label, ha="center")
            ax.set(ylim=(-2.1, 1.7))
            ax.axis("off")
    figure.tight_layout()
    return figure


def draw_nats(plt):
    """The loss against the nats that the two sampled tokens lose to the one that was never sampled."""
    figure, ax = plt.subplots(figsize=(6.4, 2.7))
    lost, found = nats()
    for (alpha, losses), color, at in zip(found.items(), (GREY, BLUE, RED), (60, 46, 16)):
        ax.plot(lost, losses, color=color)
        ax.text(at, losses[lost.index(at)] + 0.025, f"α = {alpha:g}", color=color)
    ax.set(xlabel="nats that a and b lose to c", ylabel="loss", ylim=(0, 0.7), xlim=(0, 100), xticks=[0, 50, 100],
           yticks=[0, 0.5])
    figure.tight_layout()
    return figure


def print_scale():
    """The numbers of (8f) and (8g) that derivation.md quotes."""
    for beta in (0.5, 2.0):
        (small, miss), (middle, _), (large, _) = [scale(size, beta) for size in (0.01, 0.1, 1.0)]
        print(f"(8f)   alpha 0.5, beta {beta}: push of rhat over that of the labels {small:.2f} with R / 100, "
              f"{middle:.2f} with R / 10, {large:.2f} with R")
        print(f"(8g)   with R / 100 the force on the logits misses (8g) by {miss:.3f} of it")


def draw(folder):
    """All figures as SVG. Text stays text, so that a search and the tests find the numbers; no date and no random
    names, so that the files change only with what they show."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    for name, figure in (("tree", draw_tree), ("forces", draw_forces), ("nats", draw_nats)):
        with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tgdpo", "font.size": 10}):
            drawn = figure(plt)
            drawn.savefig(Path(folder) / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(drawn)


def main(argv):
    """Print the numbers of (8f), then draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print_scale()
    try:
        draw(HERE / "figures")
    except ImportError:
        print("figures need matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main(sys.argv[1:])
