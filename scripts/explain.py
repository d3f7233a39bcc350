#!/usr/bin/env python3
"""derivation.md in numbers: every claim with both sides, on a language of 3 tokens and 4 steps.

    python scripts/explain.py              the numbers that derivation.md quotes, in a few seconds
    python scripts/explain.py --seed 7     another random language: what holds for all, and what for this one only
    python scripts/explain.py --starts 12  section 10's minimisers from 12 other starts too: slower, and lower

Below each heading a sentence says what to notice. A difference that the theory says is 0 is printed as <1e-09, or as
<0.001 where a search found one side. A 0.0000 is a number that happens to be 0.

Where tgdpo.py has a formula, this calls its function; the rest of derivation.md is computed here. Tables are (S, A) and
a tree is what section 1 of tgdpo.py calls a language, (states, actions). States stand in the order of a heap: the root
is 0, action a leads from state s to state A s + 1 + a, and what lies beyond the last step has value 0. Here S = 40,
A = 3, and there are Y = 81 sequences of T = 4 tokens. Float64.
"""
import argparse
import itertools
import math
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from tgdpo import (along, closed_form_policy, dpo_loss, guidance, implicit_reward, phi_and_delta,
                   sequence_ppo_objective, tgdpo_loss, theorem_4_1, token_ppo_objective, token_rewards)
from treg import treg_loss

ALPHAS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


# ------------------------------------------------------------------------------------------- a language small enough
def f64(numbers):
    """A float64 tensor of Python numbers, not rounded to float32 on the way."""
    return torch.tensor(numbers, dtype=torch.float64)


def sequences(steps, actions):
    """All sequences of a tree -> the states that they pass and the actions they take there, each (Y, T)."""
    taken = torch.tensor(list(itertools.product(range(actions), repeat=steps)))
    states = torch.zeros_like(taken)
    for t in range(1, steps):
        states[:, t] = actions * states[:, t - 1] + 1 + taken[:, t - 1]
    return states, taken


def language(seed, steps=4, actions=3):
    """A random language -> (reference log-probs (S, A), token rewards (S, A), its tree)."""
    rng, count = random.Random(seed), (actions**steps - 1) // (actions - 1)
    logits, rewards = [f64([[rng.gauss(0, 1) for _ in range(actions)] for _ in range(count)])
                       for _ in range(2)]
    return logits.log_softmax(-1), rewards, sequences(steps, actions)


def probability(log_policy, tree):
    """π(y) of every sequence, (Y,): token log-probs add up."""
    return along(log_policy, tree).sum(-1).exp()


def divergence(log_policy, ref_logps, tree):
    """KL(π || π_ref) of whole sequences."""
    return (probability(log_policy, tree) * along(log_policy - ref_logps, tree).sum(-1)).sum().item()


# --------------------------------------------------------------------------------------------- optima and minimisers
def soft_optimum(ref_logps, reward, beta):
    """The exact maximiser of J by soft value iteration -> (log_policy (S, A), V (S,), next values (S, A))."""
    count, actions = ref_logps.shape
    values, old = ref_logps.new_zeros(count * actions + 1), None
    while old is None or not torch.equal(values, old):   # a sweep more than there are steps
        old, ahead = values, values[1:].view(count, actions)                            # V(s') of each action, (S, A)
        # (5b)  π*(a|s) = π_ref exp((r + V(s') - V(s)) / β): the closed form with the future in the reward
        log_policy, log_Z = closed_form_policy(ref_logps, reward + ahead, beta)
        # (5a)  V(s) = β log Σ_a π_ref exp((r + V(s')) / β)
        values = torch.cat([beta * log_Z, values[count:]])
    return log_policy, values[:count], ahead


def root(log_sum, low, high):
    """Where a falling function of one number a state, (S,) -> (S,), crosses 0, by bisection between low and high."""
    for _ in range(60):
        middle = (low + high) / 2
        above = log_sum(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return middle


def consistent_policy(ref_logps, reward, beta, f):
    """What the loss without δ learns when f does not depend on the label: V from the last step back -> (S, A)."""
    count, actions = ref_logps.shape
    values, old = ref_logps.new_zeros(count * actions + 1), None
    while old is None or not torch.equal(values, old):
        old, gain = values, reward + values[1:].view(count, actions)

        def policy(value):
            # (7c)  π(a|s) = π_ref exp((r + V(s') - V(s)) / (β f)), with V(s) such that it sums to 1
            return ref_logps + (gain - value[:, None]) / (beta * f)
        value = root(lambda v: policy(v).logsumexp(-1), gain.min(-1).values, gain.max(-1).values)
        values = torch.cat([value, values[count:]])
    return policy(value)


def kl_weighted_policy(ref_logps, reward, beta, f):
    """The other problem, f on the KL: the maximiser of E_π[ r - β f log π / π_ref ] in each state -> (S, A)."""
    def policy(value):
        # (6b)  π(a|s) = π_ref exp((r - λ(s)) / (β f) - 1), with λ(s) such that it sums to 1
        return ref_logps + (reward - value[:, None]) / (beta * f) - 1
    low, high = (reward - beta * f).min(-1).values, reward.max(-1).values
    return policy(root(lambda value: policy(value).logsumexp(-1), low, high))


def minimise(loss, start, tolerance=1e-7):
    """BFGS over the logits of a table, until no gradient is above tolerance -> (log_policy, the loss there).

    Not torch.optim.LBFGS: 120 numbers are few enough for the full matrix, and torch.optim first loads torch._dynamo.
    """
    def measure(x):
        x = x.detach().requires_grad_()
        value = loss(x.view_as(start).log_softmax(-1))
        return value.item(), torch.autograd.grad(value, x)[0]

    x, inverse = start.detach().flatten(), None                                         # inverse Hessian, (S A, S A)
    value, gradient = measure(x)
    for _ in range(1000):
        step = -gradient / gradient.norm() if inverse is None else -inverse @ gradient
        slope = step @ gradient
        if gradient.abs().max() < tolerance or slope > -1e-18:
            break
        while (new := measure(x + step))[0] > value + 1e-4 * slope and slope < -1e-18:   # backtracking
            step, slope = step / 2, slope / 2
        turned = new[1] - gradient
        x, (value, gradient), curved = x + step, new, step @ turned
        if curved > 1e-12 * step.norm() * turned.norm():
            inverse = torch.eye(len(x), dtype=x.dtype) * curved / (turned @ turned) if inverse is None else inverse
            h = inverse @ turned
            inverse = (inverse + (1 + turned @ h / curved) * torch.outer(step, step) / curved
                       - (torch.outer(h, step) + torch.outer(step, h)) / curved)
    log_policy = x.view_as(start).log_softmax(-1)
    return log_policy, value


def pair_weights(probabilities, totals):
    """How often y beats y' in the data, (Y, Y): two different responses, drawn alike, labelled by Bradley-Terry."""
    # (3b)  P(y_w beats y_l) = σ( R(y_w) - R(y_l) )
    wins = torch.sigmoid(totals[:, None] - totals)
    weights = (probabilities[:, None] * probabilities * wins).fill_diagonal_(0)
    return weights / weights.sum()


def all_pairs(table, tree):
    """A table along every y as chosen, (Y, 1, T), and along every y' as rejected, (1, Y, T): a loss that sums over T
    then compares all with all, (Y, Y)."""
    tokens = along(table, tree)
    return tokens[:, None], tokens[None]


def pair_losses(log_policy, ref_logps, rewards, beta, alpha, tree):
    """tgdpo.py's loss of every y as chosen against every y' as rejected, (Y, Y)."""
    tables = [side for table in (log_policy, ref_logps, rewards) for side in all_pairs(table, tree)]
    return tgdpo_loss(*tables, beta, alpha)[0]


def preference_loss(w, log_policy, log_Z, f, delta):
    """The mean of -log σ(φ + δ), without delta of -log σ(φ), over all labelled pairs; one f, whoever wins."""
    phi, rest = phi_and_delta(log_policy, w.ref, log_Z, w.beta, f, f, w.tree)
    return -(w.weights * F.logsigmoid(phi + rest if delta else phi)).sum()


# ------------------------------------------------------------------------------------------------------- the walk
def world(seed, beta=1.0):
    """What all sections share: a language, its exact and its myopic optimum, and all its labelled pairs."""
    w = SimpleNamespace(beta=beta, seed=seed)
    w.ref, w.reward, w.tree = language(seed)
    w.R = along(w.reward, w.tree).sum(-1)                                               # R(y), (Y,)
    w.p_ref = probability(w.ref, w.tree)                                                # π_ref(y), (Y,)
    w.exact, w.V, w.ahead = soft_optimum(w.ref, w.reward, beta)
    w.myopic, w.log_Z = closed_form_policy(w.ref, w.reward, beta)
    w.weights = pair_weights(w.p_ref, w.R)
    return w


def J(w, log_policy):
    """(1b) of a policy in the walk's language, a number."""
    return sequence_ppo_objective(log_policy, w.ref, w.reward, w.beta, w.tree).item()


def apart(a, b):
    """The largest difference between two policies' probabilities of a token."""
    return (a.exp() - b.exp()).abs().max().item()


def zero(difference, below=1e-9):
    """A difference that the theory says is 0, in words; as a number if it is not below what rounding leaves."""
    return f"<{below:g}" if difference < below else f"{difference:.4f}"


def found_zero(difference):
    """The same where one side was searched for."""
    return zero(difference, 1e-3)


def section_1(w):
    """one lemma: what a KL penalty asks for
    Whatever the policy p is, it falls short of the maximum by its KL to the best policy."""
    p, q, g = w.exact[0], w.ref[0], w.reward[0]
    best, log_N = closed_form_policy(q, g, 1.0)
    # (1c)  E_p[ g - log p/q ] = log N - KL(p || q exp(g) / N)
    print(f"(1c)   {token_ppo_objective(p, q, g, 1.0):.4f} = {log_N:.4f} - {(p.exp() * (p - best)).sum():.4f}")


def section_2(w):
    """sequence-level PPO: its optimum by enumeration and by ascent
    Listing all 81 responses and climbing J by gradients end at one policy."""
    # (2a)  π*(y) = π_ref(y) exp((R(y) - V(x)) / β), and max J = V(x) = β log Σ_y π_ref(y) exp(R(y) / β)
    best, log_N = closed_form_policy(w.p_ref.log(), w.R, w.beta)
    found, loss = minimise(lambda p: -sequence_ppo_objective(p, w.ref, w.reward, w.beta, w.tree), w.ref, 1e-5)
    print(f"(2a)   max J = V(x) = {w.beta * log_N:.4f}; gradient ascent on (1b) reaches {-loss:.4f}")
    print(f"       the policies that they give differ by "
          f"{found_zero((best.exp() - probability(found, w.tree)).abs().max())}")


def section_3(w):
    """DPO
    A policy is the optimum for the reward that is read off it: so DPO's loss over all pairs finds PPO's policy."""
    # (3a)  R(y) = β log π*(y) / π_ref(y) + V(x)
    R = implicit_reward(along(w.exact, w.tree).sum(-1), w.p_ref.log(), w.beta, log_Z=w.V[0] / w.beta)
    print(f"(3a)   the reward read off the optimal policy misses R(y) by {zero((R - w.R).abs().max())}")

    def loss(log_policy):
        return (w.weights * dpo_loss(*all_pairs(log_policy, w.tree), *all_pairs(w.ref, w.tree), w.beta)[0]).sum()
    found, _ = minimise(loss, w.ref)
    print("(3c)   the minimiser of DPO's loss over all pairs misses the optimum of J by "
          f"{found_zero(apart(found, w.exact))}")


def bounds(ref_logps, reward, beta, tree):
    """-> max J, by (2a); its bound by Theorem 4.1; the same sum over the reference's states."""
    ref_y, R = [along(table, tree).sum(-1) for table in (ref_logps, reward)]
    _, log_Z = closed_form_policy(ref_logps, reward, beta)
    return beta * closed_form_policy(ref_y, R, beta)[1], *theorem_4_1(ref_logps, log_Z, beta, tree)


def section_4(w):
    """one problem for each token: Theorem 4.1, and what is lost when D is fixed
    The theorem's bound holds, but it is loose. With D fixed it may lie on either side of max J."""
    best, right, fixed = bounds(w.ref, w.reward, w.beta, w.tree)
    print(f"(4.1)  Theorem 4.1: {best:.4f} <= {right:.4f}")
    # (4a)  J(π) = E_π Σ_t [ β log Z(s_t) - β KL(π || π_m)(s_t) ]: what is lost against π_m, state by state
    lost = (w.exact.exp() * (w.exact - w.myopic)).sum(-1)
    left = along((w.log_Z - lost)[:, None].expand_as(w.ref), w.tree).sum(-1)
    sums = (probability(w.exact, w.tree) * w.beta * left).sum()
    print(f"(4a)   J of the exact optimum: {J(w, w.exact):.4f} = {sums:.4f}")
    print(f"(4b)   with D fixed to the reference's: {fixed:.4f}, {'no' if fixed < best else 'an'} upper bound")
    ref = f64([[0.001, 0.999], [0.5, 0.5], [0.5, 0.5]]).log()
    reward = f64([[0.0, 0.0], [10.0, 10.0], [0.0, 0.0]])
    best, right, fixed = bounds(ref, reward, 1.0, sequences(2, 2))
    print(f"       a reward of 10 behind a token of probability .001: {best:.2f} <= {right:.2f}, "
          f"with D fixed {fixed:.2f}")
    # State 0 has an end token and a token to state 1, where every token earns -10.
    ref, reward = f64([[0.5, 0.5], [0.5, 0.5]]).log(), f64([[0.0, 0.0], [-10.0, -10.0]])
    early = torch.tensor([[0, -1], [0, 1], [0, 1]]), torch.tensor([[0, -1], [1, 0], [1, 1]])
    best, right, _ = bounds(ref, reward, 1.0, early)
    log_Z = closed_form_policy(ref, reward, 1.0)[1][early[0]].where(early[0] >= 0, -math.inf)               # (Y, T)
    print(f"       an end token of probability .5, else -10: {best:.2f} <= {right:.2f}; without the ended state the "
          f"right side would be {log_Z.amax(0).sum():.2f}")


def section_5(w):
    """the exact optimum against the closed form of each state by itself
    A state by itself (myopic) does not see where a token leads. With the future in the reward, V, it does."""
    print(f"(5b)   J: exact {J(w, w.exact):.4f}, myopic {J(w, w.myopic):.4f}, reference {J(w, w.ref):.4f}; "
          f"probabilities differ by up to {apart(w.exact, w.myopic):.4f}")
    # (5c)  r'(s,a) = r(s,a) + V(s') - V(s): the same sums but for V(x), and Z = 1 in every state
    shaped = w.reward + w.ahead - w.V[:, None]
    policy, log_Z = closed_form_policy(w.ref, shaped, w.beta)
    print(f"(5c)   with the reward shaped by V: |log Z| is {zero(log_Z.abs().max())}, the two optima differ by "
          f"{zero(apart(policy, w.exact))}")


def section_6(w):
    """the guided problem of one state, with f drawn between 0.2 and 2
    Theorem 4.3 is exact. With f on the KL term the problem is another one: it does not mind a constant reward."""
    rng = random.Random(w.seed + 1)
    f = f64([[rng.uniform(0.2, 2) for _ in row] for row in w.ref])
    policy, log_Z = closed_form_policy(w.ref, w.reward, w.beta, f)
    found, loss = minimise(lambda p: -token_ppo_objective(p, w.ref, w.reward, w.beta, f).sum(), torch.zeros_like(w.ref))
    print(f"(6a)   all states together: closed form {log_Z.sum():.4f}, ascent {-loss:.4f}")
    print(f"(4.3a) the policies differ by {found_zero(apart(policy, found))}")
    back = implicit_reward(policy, w.ref, w.beta, f, log_Z[:, None])
    print(f"(4.3c) the reward read off the policy misses r by {zero((back - w.reward).abs().max())}")
    other = kl_weighted_policy(w.ref, w.reward, w.beta, f)
    found, _ = minimise(lambda p: -(p.exp() * (w.reward - w.beta * f * (p - w.ref))).sum(), torch.zeros_like(w.ref))
    print(f"(6b)   f on the KL instead: differs from ascent by {found_zero(apart(other, found))}, from (4.3a) by "
          f"{apart(other, policy):.4f}")
    moved = [apart(solve(w.ref, w.reward, w.beta, f), solve(w.ref, w.reward + 1, w.beta, f)) for solve in
             (lambda *a: closed_form_policy(*a)[0], kl_weighted_policy)]
    print(f"       add 1 to every reward: (4.3a) moves by {moved[0]:.4f}, (6b) by {zero(moved[1])}")


def section_7(w):
    """Bradley-Terry: what dropping delta does
    With delta the loss finds the myopic policy, without it one that looks ahead: for f = 1 the optimum of J."""
    rng = random.Random(w.seed + 2)
    g = f64([[rng.uniform(-0.5, 0.5) for _ in row] for row in w.ref])
    for alpha, name in ((0.0, "f = 1     "), (1.0, "f = f(s,a)")):
        f = guidance(g, alpha, +1)
        # (7a)  β f [ log π_m / π_ref + log Z ] = r at every token, so φ + δ = R(y_w) - R(y_l)
        myopic, log_Z = closed_form_policy(w.ref, w.reward, w.beta, f)
        kept, without = [minimise(lambda p: preference_loss(w, p, log_Z, f, delta), w.ref)[0]
                         for delta in (True, False)]
        consistent = consistent_policy(w.ref, w.reward, w.beta, f)
        for tag, title, found in (("(7a)", "with delta   ", kept), ("(7c)", "without delta", without)):
            print(f"{tag}   {name} {title}: from the myopic policy {found_zero(apart(found, myopic))}, from the exact "
                  f"optimum {found_zero(apart(found, w.exact))}, from (7c) {found_zero(apart(found, consistent))}")
    theta = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    # (7b)  argmin_θ -log σ(θ + δ1) - log σ(-θ + δ2) = (δ2 - δ1) / 2
    found = [theta[(F.softplus(-theta - delta) + F.softplus(theta)).argmin()] for delta in (1.0, 0.0)]
    print(f"(7b)   two pairs, phi = (theta, -theta), delta = (1, 0): theta {found[0]:.2f} = {(0 - 1) / 2:.2f} "
          f"with delta, {round(found[1].item(), 2) + 0.0:.2f} without")
    two = SimpleNamespace(beta=1.0, ref=torch.full((3, 2), 0.5).double().log(), tree=sequences(2, 2))
    reward = f64([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    two.weights = pair_weights(probability(two.ref, two.tree), along(reward, two.tree).sum(-1))
    exact, log_Z = soft_optimum(two.ref, reward, 1.0)[0], closed_form_policy(two.ref, reward, 1.0)[1]
    found = [minimise(lambda p: preference_loss(two, p, log_Z, 1.0, delta), two.ref)[0] for delta in (True, False)]
    print(f"       two steps, reward 1 behind the first of two tokens: its probability is {found[0][0, 0].exp():.4f} "
          f"with delta, {found[1][0, 0].exp():.4f} without; {exact[0, 0].exp():.4f} at the optimum of J")


def section_8(w):
    """the practical f, and the force on a token (beta 1, alpha 0.5, at pi = pi_ref)
    A very good token is pushed up in the loser, too. A pair's two orders need not add up to 1."""
    zero = torch.zeros(1, 1).double()
    for r in f64([0.6, -0.6, 3.0, -3.0]):
        logps = torch.zeros(2, 1, 1).double().requires_grad_()
        tgdpo_loss(*logps, zero, zero, zero + r, zero + r, 1.0, 0.5)[0].sum().backward()
        # (8d)  -dL / d log π(y_t) = β σ(-φ) f_w on the chosen response, -β σ(-φ) f_l on the rejected one
        by_hand = [side * 0.5 * guidance(r, 0.5, side) for side in (+1, -1)]
        print(f"(8d)   rhat {r:+.1f}: chosen {-logps.grad[0].item():+.2f} = {by_hand[0]:+.2f}, "
              f"rejected {-logps.grad[1].item():+.2f} = {by_hand[1]:+.2f}; DPO +0.50, -0.50")
    rhat = token_rewards(w.exact, w.ref, w.beta)
    # (8e)  P(y beats y') + P(y' beats y) = σ(φ(y, y')) + σ(φ(y', y)), which is 1 for DPO
    wins = torch.exp(-pair_losses(w.exact, w.ref, rhat, w.beta, 0.5, w.tree))
    both = (wins + wins.T)[~torch.eye(len(wins), dtype=bool)]
    print(f"(8e)   P(y beats y') + P(y' beats y), the DPO model under its own rhat: from {both.min():.4f} "
          f"to {both.max():.4f}")


def section_9(w):
    """T-REG and TGDPO push one pair in one direction (the sequences of largest and of smallest R)
    One number takes one gradient to the other. At pi_ref it is 1; elsewhere each pair has its own."""
    rng = random.Random(w.seed + 3)
    logits = f64([[rng.gauss(0, 1) for _ in row] for row in w.ref]).requires_grad_()
    rhat = along(token_rewards(w.exact, w.ref, w.beta), w.tree)
    y, z = w.R.argmax()[None], w.R.argmin()[None]
    for start, name in ((logits, "random"), (w.ref.clone().requires_grad_(), "pi_ref")):
        policy, ref = along(start.log_softmax(-1), w.tree), along(w.ref, w.tree)
        ratios = policy - ref
        both = (policy[y], policy[z], ref[y], ref[z], rhat[y], rhat[z], w.beta)
        losses = [treg_loss(*both, 0.3)[0]] + [tgdpo_loss(*both, a)[0] for a in (0.3, 0.0)]
        treg, tgdpo = [torch.autograd.grad(loss, start, retain_graph=True)[0] for loss in losses[:2]]
        # (9b)  φ_TGDPO = φ_DPO + α β (Σ_t r̂_t ℓ_t over y_w + Σ_t r̂_t ℓ_t over y_l)
        phi = [-loss.expm1().log() for loss in losses[1:]]
        moved = 0.3 * w.beta * ((rhat * ratios)[y].sum() + (rhat * ratios)[z].sum())
        # (9c)  grad L_TREG = σ(-φ_DPO) / σ(-φ_TGDPO) grad L_TGDPO
        scale = torch.sigmoid(-phi[1]) / torch.sigmoid(-phi[0])
        sides = [round(x.item(), 4) + 0.0 for x in (*phi, moved)]   # + 0.0 turns -0 into 0
        print(f"(9b)   {name}: phi {sides[0]:.4f} = {sides[1]:.4f} {sides[2]:+.4f}")
        print(f"(9c)   {name}: the gradients' quotient is {(treg[0] / tgdpo[0])[0]:.4f} = {scale.item():.4f}; "
              f"over all logits it misses by {zero((treg - scale * tgdpo).abs().max())}")


def section_10(w):
    """how large alpha rhat may be: the minimiser over all pairs, with rhat from the exact DPO model
    Watch the last column: all probability can fall on one response long before any f_w is 0."""
    rhat = token_rewards(w.exact, w.ref, w.beta)
    # (10a)  E_{a~π_ref}[ r̂(s,a) ] = -β KL(π_ref || π_rm)(s), never above 0
    mean, kl = (w.ref.exp() * rhat).sum(-1)[0], (w.ref.exp() * (w.ref - w.exact)).sum(-1)[0]
    print(f"(10a)  mean of rhat under the reference, first state: {mean:.4f} = {-w.beta * kl:.4f}")
    print("         alpha   max|alpha rhat|   smallest f_w     loss       KL   largest pi(y)")
    for alpha in [0.0] + ALPHAS:
        weakest = 1 + alpha * rhat.min().item()
        row = f"       {alpha:7g} {alpha * rhat.abs().max():17.4f} {weakest:14.4f}"
        found, low = min((minimise(lambda p: (w.weights * pair_losses(p, w.ref, rhat, w.beta, alpha, w.tree)).sum(),
                                   start) for start in [w.ref] + w.starts), key=lambda pair: pair[1])
        if weakest <= 0:   # then nothing forces the loss up when that token's probability goes to 0
            print(row + ("   none found: the search runs away" if found.min() < -50 else "   none is sure to exist"))
            break
        print(f"{row} {low:8.4f} {divergence(found, w.ref, w.tree):8.4f} {probability(found, w.tree).max():15.4f}")
    print("       on data: one state, tokens a b c, three of four labels say a beats b, c is never sampled")
    ref = f64([0.4, 0.4, 0.2]).log()
    dpo = (ref + f64([0.5, -0.5, 0.0]) * math.log(3)).log_softmax(-1)   # c's logit gets no gradient
    rhat, weights = token_rewards(dpo, ref, 1.0), f64([0.75, 0.25])

    def loss(policy, alpha):   # two pairs of one token: a beats b, and b beats a
        pairs = [table[order, None] for table in (policy, ref, rhat) for order in ([0, 1], [1, 0])]     # (B, 1) each
        return (weights * tgdpo_loss(*pairs, 1.0, alpha)[0]).sum()
    for alpha in (0.0, 0.1):
        logits = dpo.clone().requires_grad_()
        loss(logits.log_softmax(-1), alpha).backward()
        by_hand = -alpha * rhat[:2].sum() * dpo[2].exp() * sum(
            c * torch.sigmoid(-(guidance(rhat[i], alpha, +1) * rhat[i] - guidance(rhat[j], alpha, -1) * rhat[j]))
            for c, i, j in ((0.75, 0, 1), (0.25, 1, 0)))
        # (10b)  -dL / dz_c = -α β σ(-φ) (r̂_a + r̂_b) π(c) for a token c that neither response takes; 0 for DPO
        print(f"(10b)  alpha {alpha}: force on the logit of c {-logits.grad[2] + 0.0:.4f} = {by_hand + 0.0:.4f}")
        moved = [loss(dpo + f64([-nats, -nats, 0.0]), alpha).item() for nats in (0, 10, 100, 1000)]
        print("       loss when a and b lose 0, 10, 100, 1000 nats to c:", *(f"{value:.4f}" for value in moved))


def section_11(w):
    """RTO: the same token reward as a return, beta1 log pi_dpo / pi_ref against a KL of weight beta2 = 1
    Only beta1 / beta2 decides, and not where in the response the reward is paid. At 1 it is the DPO model."""
    sums = along(w.exact - w.ref, w.tree).sum(-1)                                       # log π_dpo / π_ref (y), (Y,)
    end = torch.zeros_like(w.ref)
    end[w.tree[0][:, -1], w.tree[1][:, -1]] = sums                                      # all of it on the last token
    for beta1 in (0.5, 1.0, 2.0):
        # (11a)  r(s,a) = β1 log π_dpo / π_ref, so that R(y) = β1 log π_dpo(y) / π_ref(y)
        reward = implicit_reward(w.exact, w.ref, beta1)
        best, last = [soft_optimum(w.ref, r, 1.0)[0] for r in (reward, beta1 * end)]
        # (11b)  π(y) = π_ref(y)^(1 - β1/β2) π_dpo(y)^(β1/β2), normalised over y
        mixed = (w.p_ref.log() + beta1 * sums).softmax(-1)
        off = zero((probability(best, w.tree) - mixed).abs().max())
        print(f"(11b)  beta1 {beta1}: KL {divergence(best, w.ref, w.tree):.4f}; from (11b) {off}, from the DPO model "
              f"{zero(apart(best, w.exact))}, with all reward at the end {zero(apart(best, last))}")


def main(argv):
    """Print all sections of derivation.md."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="which random language (default 1, derivation.md's)")
    parser.add_argument("--starts", type=int, default=0, help="section 10: also search from so many random policies")
    options = parser.parse_args(argv)
    if options.seed < 0 or options.starts < 0:
        parser.error(f"--seed is {options.seed}, --starts {options.starts}; expected numbers that are 0 or above")
    torch.set_num_threads(1)   # the tables are tiny: threads would only wait for each other
    w = world(options.seed)
    w.starts = [(1, 3, 8)[i % 3] * language(1000 + i)[1] for i in range(options.starts)]
    sections = (section_1, section_2, section_3, section_4, section_5, section_6, section_7, section_8, section_9,
                section_10, section_11)
    for number, section in enumerate(sections, 1):
        title, notice = section.__doc__.split("\n")
        print(f"{number:<2} {title}\n   {notice.strip()}")
        section(w)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` is no error
    main(sys.argv[1:])
