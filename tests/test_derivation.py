"""derivation.md, equation by equation, against plain Python over enumerated sequences, and autograd.

Nothing that is expected here comes from the functions under test: trees are dictionaries from a prefix to lists,
and every expectation is a sum over all sequences. That a policy is best is not searched for: its gradient is 0, and
no random policy does better.
"""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tgdpo
from tgdpo import (
    along,
    closed_form_policy,
    dpo_loss,
    guidance,
    implicit_reward,
    phi_and_delta,
    sequence_ppo_objective,
    tgdpo_loss,
    theorem_4_1,
    token_ppo_objective,
    token_rewards,
)

ROOT = Path(tgdpo.__file__).parent
sys.path.insert(0, str(ROOT / "scripts"))
import explain
from explain import f64
from treg import treg_loss

TEXT = (ROOT / "derivation.md").read_text()


# ------------------------------------------------------------------------------------------ plain Python, no tensors
class Tree:
    """A random language: `ref`, `reward` and `f` map a prefix (a tuple of tokens) to one number for each next token.

    The token `end`, if there is one, ends a response. Prefixes that contain it are never reached (`live` lacks them);
    nothing is earned there, and they have a row in every table, where explain.py's heap has it.
    """

    def __init__(self, seed, steps=3, actions=3, end=None, low=0.0):
        rng = random.Random(seed)
        self.steps, self.actions, self.beta = steps, actions, rng.choice([0.4, 1.0, 2.0])
        self.prefixes = [p for t in range(steps) for p in itertools.product(range(actions), repeat=t)]
        self.live = [p for p in self.prefixes if end not in p]
        whole = [y for t in range(1, steps + 1) for y in itertools.product(range(actions), repeat=t)]
        self.responses = [y for y in whole if end not in y[:-1] and (len(y) == steps or y[-1] == end)]
        self.ref = {p: self.normal([math.exp(rng.gauss(0, 1)) for _ in range(actions)]) for p in self.prefixes}
        self.reward = {p: [(rng.gauss(0, 1) + low) * (p in self.live) for _ in range(actions)] for p in self.prefixes}
        self.f = {p: [rng.uniform(0.3, 2) for _ in range(actions)] for p in self.prefixes}
        self.other = {p: self.normal([math.exp(rng.gauss(0, 1)) for _ in range(actions)]) for p in self.prefixes}
        self.other |= {p: self.ref[p] for p in self.prefixes if p not in self.live}
        self.rows = [self.prefixes.index(p) for p in self.live]
        places = [
            [(self.prefixes.index(y[:t]), y[t]) if t < len(y) else (-1, -1) for t in range(steps)]
            for y in self.responses
        ]
        self.tree = torch.tensor(places).unbind(-1)  # (states, actions), (Y, T) each
        self.R = [self.total(self.reward, y) for y in self.responses]

    @staticmethod
    def normal(weights):
        return [w / sum(weights) for w in weights]

    def total(self, table, y):
        return sum(table[y[:t]][y[t]] for t in range(len(y)))

    def probability(self, policy, y):
        return math.prod(policy[y[:t]][y[t]] for t in range(len(y)))

    def table(self, values, log=False):
        return torch.tensor(
            [[math.log(v) if log else v for v in values[p]] for p in self.prefixes], dtype=torch.float64
        )

    def back(self, table):
        """A tensor of log-probs -> {prefix: probabilities}."""
        return {p: row for p, row in zip(self.prefixes, table.exp().tolist())}

    def J(self, policy):
        return sum(
            self.probability(policy, y)
            * (R - self.beta * math.log(self.probability(policy, y) / self.probability(self.ref, y)))
            for y, R in zip(self.responses, self.R)
        )

    def best(self, prefix):
        """π*(a | prefix) from (2a) alone: which share of the weight behind the prefix has the token a next."""
        weight = [0.0] * self.actions
        for y, R in zip(self.responses, self.R):
            if y[: len(prefix)] == prefix:
                weight[y[len(prefix)]] += self.probability(self.ref, y) * math.exp(R / self.beta)
        return self.normal(weight)

    def Z(self, prefix, f=None):
        f = f or [1.0] * self.actions
        rows = zip(self.ref[prefix], self.reward[prefix], f)
        return sum(q * math.exp(r / (self.beta * g)) for q, r, g in rows)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def slope(objective, log_policy):
    """The largest derivative of an objective by the logits of a policy."""
    logits = log_policy.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(-1)), logits)[0].abs().max().item()


def rivals(log_policy, seed=0, each=100):
    """Random policies, as log-probs: some very near a given one, some far away, some nearly deterministic."""
    draws = torch.Generator().manual_seed(seed)
    for scale in (0.003, 0.1, 1.0, 10.0):
        for _ in range(each):
            step = scale * torch.randn(log_policy.shape, generator=draws, dtype=torch.float64)
            yield (log_policy + step).log_softmax(-1)


LANGUAGES = {  # of one length, with an end token, with one where all else is bad, so that ended states are best
    "equal-0": dict(seed=0),
    "equal-1": dict(seed=1),
    "equal-2": dict(seed=2),
    "ends-3": dict(seed=3, end=0),
    "ends-4": dict(seed=4, end=2),
    "bad-5": dict(seed=5, end=1, low=-3.0),
}


@pytest.fixture(params=LANGUAGES)
def tree(request):
    return Tree(**LANGUAGES[request.param])


# ----------------------------------------------------------------------------------------------- tables of any kind
@st.composite
def tables(draw):
    """(S, A) log-probs, rewards, f (also near 0), another policy, beta."""
    states, actions = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def table(low, high):
        cells = st.floats(low, high, allow_nan=False)
        rows = st.lists(st.lists(cells, min_size=actions, max_size=actions), min_size=states, max_size=states)
        return torch.tensor(draw(rows), dtype=torch.float64)

    f = 10 ** table(-3, 1)
    return table(-5, 5).log_softmax(-1), table(-3, 3), f, table(-5, 5).log_softmax(-1), 10 ** draw(st.floats(-1.5, 1))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(tables())
def test_gibbs_and_the_closed_form_on_any_table(given_tables):
    """(1c), (6a), (4.3a), (4.3b): by sums over the actions, in Python; the closed form is best, and by the KL to it."""
    ref, reward, f, other, beta = given_tables
    policy, log_Z = closed_form_policy(ref, reward, beta, f)
    value = token_ppo_objective(other, ref, reward, beta, f)
    best = token_ppo_objective(policy, ref, reward, beta, f)
    for s in range(len(ref)):
        q, r, g, p = ref[s].exp().tolist(), reward[s].tolist(), f[s].tolist(), other[s].exp().tolist()
        exponents = [a / (beta * b) for a, b in zip(r, g)]
        top = max(exponents)
        want_Z = top + math.log(sum(a * math.exp(e - top) for a, e in zip(q, exponents)))
        want_policy = [math.log(a) + e - want_Z for a, e in zip(q, exponents)]
        want = sum(a * (e - math.log(a / b)) for a, e, b in zip(p, exponents, q))
        scale = 1 + abs(top)
        assert log_Z[s].item() == pytest.approx(want_Z, abs=1e-9 * scale), "(4.3b)"
        assert policy[s].tolist() == pytest.approx(want_policy, abs=1e-9 * scale), "(4.3a)"
        assert policy[s].exp().sum().item() == pytest.approx(1, abs=1e-9)
        assert value[s].item() == pytest.approx(want, abs=1e-9 * scale), "(6a)"
        assert best[s].item() == pytest.approx(want_Z, abs=1e-9 * scale), "the maximum is log Z"
        gap = sum(a * (math.log(a) - b) for a, b in zip(p, want_policy))
        assert want == pytest.approx(want_Z - gap, abs=1e-9 * scale), "(1c)"
        assert want <= want_Z + 1e-9 * scale


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(tables())
def test_reward_of_a_policy(given_tables):
    """(4.3c): the closed form's reward is the reward, whatever f; by hand for any other policy."""
    ref, reward, f, other, beta = given_tables
    policy, log_Z = closed_form_policy(ref, reward, beta, f)
    back = implicit_reward(policy, ref, beta, f, log_Z[:, None])
    torch.testing.assert_close(back, reward, rtol=1e-7, atol=1e-7)
    got = implicit_reward(other, ref, beta, f, log_Z[:, None])
    for s, a in itertools.product(*map(range, ref.shape)):
        want = beta * f[s, a].item() * (other[s, a].item() - ref[s, a].item() + log_Z[s].item())
        assert got[s, a].item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_does_better_than_the_closed_form(seed):
    """(6a), (4.3a), (6b): at the best policy of either problem no gradient; random policies do worse in every state."""
    torch.manual_seed(seed)
    ref, reward = torch.randn(3, 4).double().log_softmax(-1), torch.randn(3, 4).double()
    f, beta = 0.3 + torch.rand(3, 4).double(), 0.7
    policy, other = closed_form_policy(ref, reward, beta, f)[0], explain.kl_weighted_policy(ref, reward, beta, f)

    def on_the_reward(p):  # (6a)
        return (p.exp() * (reward / beta / f - p + ref)).sum(-1)

    def on_the_kl(p):  # (6b)'s problem
        return (p.exp() * (reward - beta * f * (p - ref))).sum(-1)

    for objective, best, worse in ((on_the_reward, policy, other), (on_the_kl, other, policy)):
        assert slope(lambda p: objective(p).sum(), best) < 1e-8
        assert slope(lambda p: objective(p).sum(), worse) > 0.01
        close(best.exp().sum(-1), [1.0] * 3)
        for rival in rivals(best, seed):
            assert (objective(rival) <= objective(best) + 1e-12).all()
            close(token_ppo_objective(rival, ref, reward, beta, f), on_the_reward(rival))
    assert (other.exp() - policy.exp()).abs().max() > 0.01


def test_the_problem_with_f_on_the_kl():
    """(6b): the same policy as (4.3a) where f is the same for all actions, also in shift of the reward; else not."""
    ref, reward = f64([[0.5, 0.3, 0.2]]).log(), f64([[1.0, -0.5, 0.2]])
    f = f64([[0.4, 1.3, 0.9]])
    close(explain.kl_weighted_policy(ref, reward, 0.5, 0.0 * f + 0.7), closed_form_policy(ref, reward, 0.5, 0.7)[0])
    log_policy = explain.kl_weighted_policy(ref, reward, 0.5, f)
    multiplier = reward - 0.5 * f * (log_policy - ref + 1)  # the first-order condition: one λ for all actions
    assert (multiplier.max() - multiplier.min()).item() < 1e-10
    close(log_policy.exp().sum(), 1.0)
    close(explain.kl_weighted_policy(ref, reward + 3, 0.5, f), log_policy)


def test_an_action_that_is_never_taken_counts_nothing():
    """(6a) with zeros in the policy, and in both."""
    ref, zero = f64([[0.5, 0.5, 0.0]]).log(), float("-inf")
    policy = f64([[0.0, zero, zero]])
    reward = f64([[2.0, 5.0, 9.0]])
    assert token_ppo_objective(policy, ref, reward, 2.0).item() == pytest.approx(1.0 - math.log(2))
    log_policy, log_Z = closed_form_policy(ref, reward, 2.0)
    assert log_Z.item() == pytest.approx(math.log((math.exp(1.0) + math.exp(2.5)) / 2))
    assert log_policy[0, 2].item() == zero


# ------------------------------------------------------------------------------------------------ sequences and bounds
def test_trees_are_explains(tree):
    """What these tests pass as a language: explain.py's own where all lengths are equal; -1 after an end otherwise."""
    states, actions = tree.tree
    if len(tree.live) == len(tree.prefixes):
        assert all(torch.equal(a, b) for a, b in zip(tree.tree, explain.sequences(tree.steps, tree.actions)))
    else:
        assert {len(y) for y in tree.responses} == {1, 2, 3}
    assert [(row >= 0).sum().item() for row in states] == [(row >= 0).sum().item() for row in actions]
    close(sum(tree.probability(tree.other, y) for y in tree.responses), 1.0)
    table = tree.table(tree.reward)
    want = [[tree.reward[y[:t]][y[t]] if t < len(y) else 0.0 for t in range(tree.steps)] for y in tree.responses]
    assert along(table, tree.tree).tolist() == want


def test_sequence_level_ppo(tree):
    """(1b), (2a), (3a): J by enumeration; its optimum weighs responses by π_ref exp(R / β), and its reward is R."""
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    other = tree.table(tree.other, log=True)
    close(sequence_ppo_objective(other, ref, reward, tree.beta, tree.tree), tree.J(tree.other))
    exact, V, _ = explain.soft_optimum(ref, reward, tree.beta)
    p_ref = [tree.probability(tree.ref, y) for y in tree.responses]
    Z = sum(p * math.exp(R / tree.beta) for p, R in zip(p_ref, tree.R))
    best = tree.beta * math.log(Z)
    close(V[0], best)
    close(tree.J(tree.back(exact)), best)
    want = [p * math.exp(R / tree.beta) / Z for p, R in zip(p_ref, tree.R)]
    close(explain.probability(exact, tree.tree), want)
    policy, log_Z = closed_form_policy(f64(p_ref).log(), f64(tree.R), tree.beta)
    close(policy.exp(), want)
    close(tree.beta * log_Z, best)
    sums = implicit_reward(f64(want).log(), f64(p_ref).log(), tree.beta, 1.0, log_Z)
    close(sums, tree.R)
    # No search: J has no slope at this policy, and no random policy has a larger J, by enumeration in Python.
    assert slope(lambda p: sequence_ppo_objective(p, ref, reward, tree.beta, tree.tree), exact) < 1e-8
    assert slope(lambda p: sequence_ppo_objective(p, ref, reward, tree.beta, tree.tree), other) > 1e-3
    for rival in rivals(exact, each=25):
        J = tree.J(tree.back(rival))
        assert J <= best + 1e-9
        close(sequence_ppo_objective(rival, ref, reward, tree.beta, tree.tree), J)


def test_soft_value_iteration(tree):
    """(5a), (5b), (5c): conditionals of the enumerated optimum; shaped by V, Z is 1 and the myopic policy is exact."""
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    exact, V, ahead = explain.soft_optimum(ref, reward, tree.beta)
    for i, prefix in zip(tree.rows, tree.live):
        assert exact[i].exp().tolist() == pytest.approx(tree.best(prefix), abs=1e-10)
        rest = sum(
            math.prod(tree.ref[y[:t]][y[t]] for t in range(len(prefix), len(y)))
            * math.exp(sum(tree.reward[y[:t]][y[t]] for t in range(len(prefix), len(y))) / tree.beta)
            for y in tree.responses
            if y[: len(prefix)] == prefix
        )
        assert V[i].item() == pytest.approx(tree.beta * math.log(rest), abs=1e-10)
    shaped = reward + ahead - V[:, None]
    policy, log_Z = closed_form_policy(ref, shaped, tree.beta)
    assert log_Z.abs().max() < 1e-12
    close(policy, exact)
    by_prefix = dict(zip(tree.prefixes, shaped.tolist()))
    change = [tree.total(by_prefix, y) - R for y, R in zip(tree.responses, tree.R)]
    assert max(change) - min(change) < 1e-12
    assert (closed_form_policy(ref, reward, tree.beta)[0].exp() - exact.exp()).abs().max() > 0.02


def reach(policy, prefix):
    """The probability that a policy passes a prefix."""
    return math.prod(policy[prefix[:t]][prefix[t]] for t in range(len(prefix)))


def term(tree, policy, t):
    """One t of (1b): what a policy earns at token t, less the price of that token; 0 where a response has ended."""
    total = 0.0
    for p in tree.live:
        if len(p) == t:
            gain = sum(
                a * (r - tree.beta * math.log(a / q))
                for a, r, q in zip(policy[p], tree.reward[p], tree.ref[p])
                if a > 0
            )
            total += reach(policy, p) * gain
    return total


def walk(tree, goal):
    """The policy that goes to a prefix with certainty, and plays the closed form of one state there and elsewhere."""
    policy = {
        p: Tree.normal([q * math.exp(r / tree.beta) for q, r in zip(tree.ref[p], tree.reward[p])])
        for p in tree.prefixes
    }
    for t in range(len(goal)):
        policy[goal[:t]] = [float(a == goal[t]) for a in range(tree.actions)]
    return policy


def test_theorem_41(tree):
    """(4.1), (4a), (4b): the right side by walking to every state, ended ones too; no policy has a larger term."""
    ref, reward, beta = tree.table(tree.ref, log=True), tree.table(tree.reward), tree.beta
    log_Z = {p: math.log(tree.Z(p)) for p in tree.prefixes}
    bound, fixed = [x.item() for x in theorem_4_1(ref, f64([log_Z[p] for p in tree.prefixes]), beta, tree.tree)]
    best = beta * math.log(
        sum(tree.probability(tree.ref, y) * math.exp(R / beta) for y, R in zip(tree.responses, tree.R))
    )
    got = [x.item() for x in explain.bounds(ref, reward, beta, tree.tree)]
    assert got == pytest.approx([best, bound, fixed], abs=1e-10)
    total = 0.0
    for t in range(tree.steps):
        goals = [p for p in tree.live if len(p) == t] + [y for y in tree.responses if len(y) <= t]
        values = [term(tree, walk(tree, goal), t) for goal in goals]
        assert values == pytest.approx([beta * log_Z[p] if p in tree.live else 0.0 for p in goals], abs=1e-12)
        total += max(values)
        for rival in rivals(ref, seed=t, each=25):
            assert term(tree, tree.back(rival), t) <= max(values) + 1e-12
    assert bound == pytest.approx(total, abs=1e-10)
    assert best <= bound + 1e-12
    assert fixed == pytest.approx(sum(reach(tree.ref, p) * beta * log_Z[p] for p in tree.live), abs=1e-10)
    # (4a) for a policy that is optimal in no sense
    identity = 0.0
    for p in tree.live:
        myopic = [q * math.exp(r / beta) / tree.Z(p) for q, r in zip(tree.ref[p], tree.reward[p])]
        kl = sum(a * math.log(a / b) for a, b in zip(tree.other[p], myopic))
        identity += reach(tree.other, p) * beta * (log_Z[p] - kl)
    assert identity == pytest.approx(tree.J(tree.other), abs=1e-10)
    assert sum(term(tree, tree.other, t) for t in range(tree.steps)) == pytest.approx(identity, abs=1e-10)


def test_what_is_lost_when_the_state_distribution_is_fixed():
    """(4b), by hand: log(.001 e^10 + .999) = 3.137; a term of 10 in (4.1); .001 * 10 = .01 with D fixed."""
    ref = f64([[0.001, 0.999], [0.5, 0.5], [0.5, 0.5]]).log()
    reward = f64([[0.0, 0.0], [10.0, 10.0], [0.0, 0.0]])
    got = explain.bounds(ref, reward, 1.0, explain.sequences(2, 2))
    assert [x.item() for x in got] == pytest.approx([math.log(0.001 * math.exp(10) + 0.999), 10.0, 0.01], abs=1e-6)


def test_an_ended_state_counts_0():
    """(4.1), by hand: an end token of probability .5 and reward 0, else a state where every token earns -10. At the
    root Z = .5 + .5 = 1; at the second token the ended state has log Z = 0, the other one -10. So the right side is
    0 + 0, max J = log(.5 + .5 e^-10) = -.693, and with the reference's states it is 0 - .5 * 10 = -5."""
    ref, reward = f64([[0.5, 0.5], [0.5, 0.5]]).log(), f64([[0.0, 0.0], [-10.0, -10.0]])
    early = torch.tensor([[0, -1], [0, 1], [0, 1]]), torch.tensor([[0, -1], [1, 0], [1, 1]])
    bound, fixed = theorem_4_1(ref, f64([0.0, -10.0]), 1.0, early)
    assert (bound.item(), fixed.item()) == pytest.approx((0.0, -5.0), abs=1e-12)
    best = math.log(0.5 + 0.5 * math.exp(-10))
    assert [x.item() for x in explain.bounds(ref, reward, 1.0, early)] == pytest.approx([best, 0.0, -5.0], abs=1e-12)
    assert -10 < best < -0.69  # what the right side would be without the ended state is no bound
    all_end = torch.tensor([[0], [0]]), torch.tensor([[0], [1]])  # and where all have one token, none has ended early
    bound, fixed = theorem_4_1(ref, f64([-3.0, -10.0]), 2.0, all_end)
    assert (bound.item(), fixed.item()) == pytest.approx((-6.0, -6.0), abs=1e-12)


# --------------------------------------------------------------------------------------- what the minimisers are
def plain_loss(tree, log_policy, f_w, f_l, log_Z=None):
    """E[-log σ(φ + δ)] over all labelled pairs, with nothing of tgdpo.py: one loop over the two responses."""
    ratios = log_policy - tree.table(tree.ref, log=True) + (0 if log_Z is None else log_Z[:, None])
    index = {p: i for i, p in enumerate(tree.prefixes)}

    def total(f, y):
        return sum(tree.beta * f[y[:t]][y[t]] * ratios[index[y[:t]], y[t]] for t in range(len(y)))

    won, lost = [[total(f, y) for y in tree.responses] for f in (f_w, f_l)]
    loss, weights = 0.0, 0.0
    for i, j in itertools.permutations(range(len(tree.responses)), 2):
        weight = tree.probability(tree.ref, tree.responses[i]) * tree.probability(tree.ref, tree.responses[j])
        weight /= 1 + math.exp(tree.R[j] - tree.R[i])
        loss, weights = loss - weight * torch.nn.functional.logsigmoid(won[i] - lost[j]), weights + weight
    return loss / weights


def plain_phi(tree, table, f_w, f_l):
    """Σ_t β f_w x over y less Σ_t β f_l x over y', for all y and y', {prefix: numbers} -> (Y, Y), in Python."""
    won, lost = [
        [sum(tree.beta * f[y[:t]][y[t]] * table[y[:t]][y[t]] for t in range(len(y))) for y in tree.responses]
        for f in (f_w, f_l)
    ]
    return f64([[a - b for b in lost] for a in won])


@pytest.mark.parametrize("end", [None, 1])
def test_pair_losses_are_the_plain_sum(end):
    """(3b), (3c), (4.4a), (4.4b), (8b), (8c): all pairs equal loops in Python, with δ and without, α = 0 and above."""
    tree = Tree(5, steps=2, actions=2, end=end)
    ref, log_policy = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    rhat, R = tree.table(tree.reward), f64(tree.R)
    weights = explain.pair_weights(explain.probability(ref, tree.tree), R)
    ell = {p: [math.log(a / q) for a, q in zip(tree.other[p], tree.ref[p])] for p in tree.prefixes}
    log_Z = {p: [math.log(tree.Z(p))] * tree.actions for p in tree.prefixes}
    Z_rows = f64([log_Z[p][0] for p in tree.prefixes])
    for alpha in (0.0, 0.4):
        f_w, f_l = [{p: [1 + sign * alpha * r for r in row] for p, row in tree.reward.items()} for sign in (+1, -1)]
        phi, delta = plain_phi(tree, ell, f_w, f_l), plain_phi(tree, log_Z, f_w, f_l)
        for sign, f in ((+1, f_w), (-1, f_l)):
            close(guidance(rhat, alpha, sign), tree.table(f))  # (8b)
        tables = (tree.table(f_w), tree.table(f_l)) if alpha else (1.0, 1.0)
        got = phi_and_delta(log_policy, ref, Z_rows, tree.beta, *tables, tree.tree)
        close(got[0], phi)  # (4.4a)
        close(got[1], delta)  # (4.4b)
        losses = explain.pair_losses(log_policy, ref, rhat, tree.beta, alpha, tree.tree)
        close(losses, [[math.log1p(math.exp(-x)) for x in row] for row in phi.tolist()])  # (8c)
        if not alpha:
            pairs = [*explain.all_pairs(log_policy, tree.tree), *explain.all_pairs(ref, tree.tree)]
            close(dpo_loss(*pairs, tree.beta)[0], losses)  # (3c)
        close((weights * losses).sum(), plain_loss(tree, log_policy, f_w, f_l))  # (3b)
        shifted = explain.pair_losses(log_policy + Z_rows[:, None], ref, rhat, tree.beta, alpha, tree.tree)
        close((weights * shifted).sum(), plain_loss(tree, log_policy, f_w, f_l, Z_rows))


def test_bradley_terry_is_phi_and_delta(tree):
    """(4.4a), (4.4b): φ + δ = R(y_w) - R(y_l) at every pair for the closed form of (4.3a), whatever f, if it is one."""
    ref, reward, f = tree.table(tree.ref, log=True), tree.table(tree.reward), tree.table(tree.f)
    policy, log_Z = closed_form_policy(ref, reward, tree.beta, f)
    phi, delta = phi_and_delta(policy, ref, log_Z, tree.beta, f, f, tree.tree)
    close(phi + delta, f64(tree.R)[:, None] - f64(tree.R))
    assert delta.abs().max() > 0.1


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("end", [None, 0])
def test_minimisers_with_and_without_delta(guided, end):
    """(3c), (7a), (7c): with δ the myopic policy; without it the exact one (f = 1) or (7c). No search: a cross-entropy
    is at least the entropy of the labels, these policies reach it, with no slope, and no other policy does."""
    tree = Tree(3, steps=2, actions=3, end=end)
    ref, reward = tree.table(tree.ref, log=True), tree.table(tree.reward)
    ones = {p: [1.0] * tree.actions for p in tree.prefixes}
    f = tree.f if guided else ones
    log_Z = f64([math.log(tree.Z(p, f[p])) for p in tree.prefixes])
    myopic = [
        Tree.normal([q * math.exp(r / (tree.beta * g)) for q, r, g in zip(tree.ref[p], tree.reward[p], f[p])])
        for p in tree.prefixes
    ]
    consistent = explain.consistent_policy(ref, reward, tree.beta, tree.table(f))
    sums = along(tree.table(f) * (consistent - ref) * tree.beta, tree.tree).sum(-1) - f64(tree.R)
    assert (sums.max() - sums.min()).item() < 1e-9, "(7c): β f l must add up to R and a constant"
    exact = f64([tree.best(p) for p in tree.live])
    assert ((consistent.exp()[tree.rows] - exact).abs().max() < 1e-9) == (not guided)
    pairs = [
        (tree.probability(tree.ref, a) * tree.probability(tree.ref, b), 1 / (1 + math.exp(S - R)))
        for (a, R), (b, S) in itertools.permutations(zip(tree.responses, tree.R), 2)
    ]
    entropy = -sum(p * won * math.log(won) for p, won in pairs) / sum(p * won for p, won in pairs)
    problems = [(None, consistent, f64(myopic).log()), (log_Z, f64(myopic).log(), consistent)]
    for shift, best, worse in problems:  # without δ, with δ

        def loss(p):
            return plain_loss(tree, p, f, f, shift)

        assert loss(best).item() == pytest.approx(entropy, abs=1e-12)
        assert slope(loss, best) < 1e-8
        assert loss(worse).item() > entropy + 1e-4
        assert all(loss(rival).item() > entropy for rival in rivals(best, each=5))


def test_labels_of_the_pairs_of_three_words(tmp_path):
    """(3b): the pairs of `python tgdpo.py` are two responses of the reference, and y beats z with σ( R(y) - R(z) )."""
    file = tmp_path / "pairs.jsonl"
    tgdpo.small_data(tgdpo.Options(seed=1, max_length=8), tmp_path / "start", file)
    rows, world = [json.loads(line) for line in file.read_text().splitlines()], SmallWorld()
    assert len(rows) == tgdpo.TINY_PAIRS
    count = Counter((row["chosen"], row["rejected"]) for row in rows)
    share = {(y, z): world.ref_y[y] * world.ref_y[z] for y, z in itertools.combinations(world.responses, 2)}
    for (y, z), weight in share.items():
        both, wins = count[y, z] + count[z, y], 1 / (1 + math.exp(world.R[z] - world.R[y]))
        expected = len(rows) * weight / sum(share.values())
        assert abs(both - expected) < 4.5 * math.sqrt(expected)
        assert abs(count[y, z] - both * wins) < 4.5 * math.sqrt(both * wins * (1 - wins)) + 1, (y, z)
    assert sum(count[pair] + count[pair[::-1]] for pair in share) == len(rows), "no response meets itself"


def test_theorem_44_is_about_one_pair():
    """(7b): minimum of -log σ(θ + 1) - log σ(-θ) at -1/2, of the sum without δ at 0, by search."""

    def found(delta):
        grid = [i / 1000 for i in range(-2000, 2001)]
        return min(grid, key=lambda x: math.log1p(math.exp(-x - delta[0])) + math.log1p(math.exp(x - delta[1])))

    assert found((1, 0)) == -0.5
    assert found((0, 0)) == 0.0
    assert found((0.2, 1.0)) == pytest.approx(0.4)


# ------------------------------------------------------------------------------ the practical f and its neighbours
def random_pair(seed):
    """Log-ratios with a gradient through a small softmax, r̂, and the parameters."""
    torch.manual_seed(seed)
    logits = torch.randn(6, 4).double().requires_grad_()
    ref, rhat = torch.randn(6, 4).double().log_softmax(-1), torch.randn(6, 4).double()
    states, actions = torch.randint(6, (2, 1, 5)), torch.randint(4, (2, 1, 5))
    tables = [logits.log_softmax(-1), ref, rhat]
    return logits, [[table[states[i], actions[i]] for i in (0, 1)] for table in tables]


@pytest.mark.parametrize("seed", range(5))
def test_treg_and_tgdpo_are_one_gradient(seed):
    """(9a), (9b), (9c), (8e): by formulas written out, for one pair and a random small policy."""
    beta, alpha = 0.7, 0.4
    logits, (policy, ref, rhat) = random_pair(seed)
    l_w, l_l = [p - q for p, q in zip(policy, ref)]
    d = beta * (l_w.sum() - l_l.sum())
    added = alpha * beta * ((rhat[0] * l_w).sum() + (rhat[1] * l_l).sum())
    tgdpo_ = tgdpo_loss(*policy, *ref, *rhat, beta, alpha)[0].sum()
    close(tgdpo_.detach(), math.log1p(math.exp(-(d + added).item())))  # (9b)
    w = 1 / (1 + math.exp(d.item()))
    treg = -torch.nn.functional.logsigmoid(d) - alpha * w * beta * (
        (rhat[0] * policy[0]).sum() + (rhat[1] * policy[1]).sum()
    )
    ours = treg_loss(*policy, *ref, *rhat, beta, alpha)[0].sum()
    wanted, got, other = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (treg, ours, tgdpo_)]
    close(got, wanted)
    scale = w * (1 + math.exp((d + added).item()))
    close(wanted, scale * other)
    assert (wanted - other).abs().max() > 1e-3
    back = tgdpo_loss(*policy[::-1], *ref[::-1], *rhat[::-1], beta, alpha)[0].sum()
    both = math.exp(-tgdpo_.item()) + math.exp(-back.item())  # (8e)
    want = sum(1 / (1 + math.exp(-x)) for x in ((d + added).item(), (-d + added).item()))
    assert both == pytest.approx(want)
    assert (both > 1) == (added.item() > 0)


def test_mean_token_reward_is_minus_a_divergence(tree):
    """(8a), (10a): Σ π_ref r̂ = -β KL(π_ref || π_rm) <= 0."""
    ref, rm = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    rhat = token_rewards(rm, ref, tree.beta)
    for i, p in enumerate(tree.prefixes):
        kl = sum(q * math.log(q / m) for q, m in zip(tree.ref[p], tree.other[p]))
        assert (ref[i].exp() * rhat[i]).sum().item() == pytest.approx(-tree.beta * kl)
        want = [tree.beta * (math.log(m) - math.log(q)) for q, m in zip(tree.ref[p], tree.other[p])]
        assert rhat[i].tolist() == pytest.approx(want)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
def test_a_token_that_was_never_sampled(alpha):
    """(10b): the force on its logit, and no minimiser for any alpha > 0 if both sampled r̂ are negative."""
    ref, beta = f64([0.4, 0.4, 0.2]).log(), 0.8
    rhat = f64([-0.2, -0.5, 0.0])
    logits = f64([0.3, -0.4, 0.1]).requires_grad_()

    def loss(p):
        def pair(w, loser):
            return tgdpo_loss(*[x[i][None, None] for x in (p, ref, rhat) for i in (w, loser)], beta=beta, alpha=alpha)[
                0
            ].sum()

        return pair(0, 1), pair(1, 0)

    p = logits.log_softmax(-1)
    ell = (p - ref).detach()
    phi = beta * ((1 + alpha * rhat[0]) * ell[0] - (1 - alpha * rhat[1]) * ell[1])
    loss(p)[0].backward()
    want = -alpha * beta * torch.sigmoid(-phi) * (rhat[0] + rhat[1]) * p[2].exp()
    close(-logits.grad[2], want.detach())
    lost = [sum(loss(p.detach() - n * f64([1.0, 1.0, 0.0]))).item() for n in (0, 10, 1000)]
    if alpha == 0:
        assert lost == pytest.approx([lost[0]] * 3)
    else:
        assert lost[0] > lost[1] > lost[2] and lost[2] < 1e-10


def test_a_shared_token_is_pushed_only_by_tgdpo():
    """(8d): a token that both responses have gets f_w - f_l = 2 α r̂ in TGDPO, nothing in DPO."""
    for alpha in (0.0, 0.3):
        shared = torch.zeros(()).double().requires_grad_()
        rows = [torch.stack([shared, f64(x)])[None] for x in (0.4, -0.2)]
        zeros, rhat = torch.zeros(1, 2).double(), f64([[-0.7, 0.5]])
        tgdpo_loss(*rows, zeros, zeros, rhat, rhat, 0.5, alpha)[0].sum().backward()
        phi = 0.5 * ((1 + alpha * 0.5) * 0.4 - (1 - alpha * 0.5) * -0.2)
        want = 2 * alpha * -0.7 * 0.5 / (1 + math.exp(phi))
        assert -shared.grad.item() == pytest.approx(want, abs=1e-12)


def test_the_loss_holds_the_policy_while_f_is_positive():
    """Section 10: with α r̂ > -1 the loss of some pair grows without bound when a token dies; below -1 it need not."""
    ref = f64([0.5, 0.3, 0.2]).log()
    for bad, grows in ((-0.9, True), (-1.1, False)):
        rhat, worst = f64([bad, 0.2, 0.4]), []
        for nats in (10, 100, 1000):
            p = (ref - f64([nats, 0.0, 0.0])).log_softmax(-1)
            pairs = itertools.permutations(range(3), 2)
            worst.append(
                max(
                    tgdpo_loss(*[x[i][None, None] for x in (p, ref, rhat) for i in pair], 1.0, 1.0)[0] for pair in pairs
                )
            )
        assert (worst[2] > 50) == grows


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_rto(tree, ratio):
    """(11a), (11b): the optimum by enumeration; the DPO model itself for β1 = β2; also with all reward at the end."""
    ref, dpo = tree.table(tree.ref, log=True), tree.table(tree.other, log=True)
    beta2 = 0.6
    best, _, _ = explain.soft_optimum(ref, implicit_reward(dpo, ref, ratio * beta2), beta2)
    weights = [
        tree.probability(tree.ref, y) ** (1 - ratio) * tree.probability(tree.other, y) ** ratio for y in tree.responses
    ]
    close(explain.probability(best, tree.tree), Tree.normal(weights))
    rows = tree.rows
    assert ((best - dpo)[rows].abs().max() < 1e-9) == (ratio == 1.0)
    end = torch.zeros_like(ref)
    for i, y in enumerate(tree.responses):
        whole = math.log(tree.probability(tree.other, y) / tree.probability(tree.ref, y))
        end[tree.prefixes.index(y[:-1]), y[-1]] = ratio * beta2 * whole
    close(explain.soft_optimum(ref, end, beta2)[0][rows], best[rows])


# -------------------------------------------------------------------------------------------- what the script prints
class SmallWorld:
    """The three words of `python tgdpo.py`, from its tables alone: float64, prefixes of words, plain sums."""

    def __init__(self):
        self.words, states = ["not", "bad", "."], [(), ("not",), ("bad",)]
        ref, reward = [
            {s: dict(zip(self.words, row)) for s, row in zip(states, table.double().tolist())}
            for table in (tgdpo.SMALL_REF.exp(), tgdpo.SMALL_REWARD)
        ]
        self.ref = {s: {a: p / sum(row.values()) for a, p in row.items()} for s, row in ref.items()}
        self.reward = reward
        two = [s + (a,) for s in states[1:] for a in self.words]
        self.tokens = {" ".join(y): y for y in [(".",), *two]}  # a full stop ends a response, and so do two words
        self.responses = list(self.tokens)
        self.R = {y: self.total(reward, y) for y in self.responses}
        self.ref_y = {y: self.chance(self.ref, y) for y in self.responses}

    def steps(self, y):
        return [(self.tokens[y][:t], self.tokens[y][t]) for t in range(len(self.tokens[y]))]

    def total(self, table, y):
        return sum(table[s][a] for s, a in self.steps(y))

    def chance(self, policy, y):
        return math.prod(policy[s][a] for s, a in self.steps(y))

    def J(self, policy):
        chances = {y: self.chance(policy, y) for y in self.responses}
        return sum(p * (self.R[y] - math.log(p / self.ref_y[y])) for y, p in chances.items())

    def closed_form(self, f):
        """-> (policy, Z) of each state, for f as a dictionary."""
        weights = {
            s: {a: p * math.exp(self.reward[s][a] / f[s][a]) for a, p in row.items()} for s, row in self.ref.items()
        }
        Z = {s: sum(row.values()) for s, row in weights.items()}
        return {s: {a: w / Z[s] for a, w in row.items()} for s, row in weights.items()}, Z


def test_the_small_language_is_what_it_says():
    """Its arrays, its list of responses and its two probabilities, against the words themselves."""
    world = SmallWorld()
    assert sorted(world.responses) == sorted(tgdpo.RESPONSES)
    states, index = [(), ("not",), ("bad",)], {word: i for i, word in enumerate(world.words)}
    for text, row, actions in zip(tgdpo.RESPONSES, *[x.tolist() for x in tgdpo.SMALL_LANGUAGE], strict=True):
        want = [(states.index(s), index[a]) for s, a in world.steps(text)]
        assert list(zip(row, actions)) == want + [(-1, -1)] * (2 - len(want))
    assert tgdpo.SMALL_REF.exp().sum(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert sum(world.ref_y.values()) == pytest.approx(1.0)


def decomposition(world):
    """{tag: the numbers that show_decomposition should print behind it}, by brute force in float64. The 1000 other
    policies are its own draw; what each of them earns is computed here."""
    ones = {s: dict.fromkeys(row, 1.0) for s, row in world.ref.items()}
    weights = {y: world.ref_y[y] * math.exp(R) for y, R in world.R.items()}
    whole, best = {y: w / sum(weights.values()) for y, w in weights.items()}, math.log(sum(weights.values()))
    alone, Z = world.closed_form(ones)
    says_not = [y for y in world.responses if y.startswith("not")]
    assert best == pytest.approx(sum(p * (world.R[y] - math.log(p / world.ref_y[y])) for y, p in whole.items()))
    # After the first token all can have ended: log Z = 0 there.
    bound = math.log(Z[()]) + max(0.0, *[math.log(Z[s]) for s in (("not",), ("bad",))])
    fixed = math.log(Z[()]) + sum(world.ref[()][s[0]] * math.log(Z[s]) for s in (("not",), ("bad",)))
    rhat = {s: {a: math.log(p / world.ref[s][a]) for a, p in row.items()} for s, row in alone.items()}
    f_w, f_l = [{s: {a: 1 + x * r for a, r in row.items()} for s, row in rhat.items()} for x in (0.25, -0.25)]
    guided, guided_Z = world.closed_form(f_w)
    draws = torch.randn(1000, 3, 3, generator=torch.Generator().manual_seed(0)).double().softmax(-1)[:, 0].tolist()
    earned = [
        sum(
            p * (world.reward[()][a] / f_w[()][a] - math.log(p / world.ref[()][a])) for p, a in zip(policy, world.words)
        )
        for policy in draws
    ]
    missed = max(
        abs(f_w[s][a] * (math.log(guided[s][a] / world.ref[s][a]) + math.log(guided_Z[s])) - world.reward[s][a])
        for s in world.ref
        for a in world.words
    )
    w, l = "not bad", "bad ."
    phi = sum(rhat[s][a] for s, a in world.steps(w)) - sum(rhat[s][a] for s, a in world.steps(l))
    delta = sum(math.log(Z[s]) for s, _ in world.steps(w)) - sum(math.log(Z[s]) for s, _ in world.steps(l))
    ahead = math.log(whole[w] / world.ref_y[w]) - math.log(whole[l] / world.ref_y[l])
    return {
        "1b": [world.J(world.ref), best],
        "4.1": [best, bound],
        "4b": [fixed],
        "4.3a": [world.J(alone), alone[()]["not"], sum(whole[y] for y in says_not)],
        "6a": [0.25, math.log(guided_Z[()]), max(earned)],
        "4.3c": [missed],
        "4.4a": [world.R[w] - world.R[l], phi, delta, ahead],
        "8b": [x["not",]["bad"] for x in (rhat, f_w, f_l)],
    }


def test_what_the_script_prints(capsys):
    """(1b), (2a), (4.1), (4b), (4.3a), (6a), (4.3c), (4.4a), (8b): each number, and what is said about them."""
    tgdpo.show_decomposition()
    printed, world = capsys.readouterr().out, SmallWorld()
    expected = decomposition(world)
    blocks = dict(re.findall(r"^\((.*?)\) +(.*?)(?=^\(|\Z)", printed, re.M | re.S))
    assert {*blocks} == {*expected}
    for tag, values in expected.items():
        numbers = re.findall(r"-?\d+\.\d+", blocks[tag].replace("Theorem 4.1", ""))
        assert len(numbers) == len(values), (tag, blocks[tag])
        for number, value in zip(numbers, values):
            half = 0.5 * 10 ** -len(number.split(".")[1])
            assert float(number) == pytest.approx(value, abs=half + 1e-5), (tag, blocks[tag])
    (J_ref, best), (_, bound), (J_alone, p_alone, p_best) = [expected[tag] for tag in ("1b", "4.1", "4.3a")]
    assert J_ref < J_alone < best < bound and p_alone < p_best
    assert expected["4b"][0] < best, "with the reference's states it is no bound"
    assert expected["6a"][2] < expected["6a"][1], "no other policy does better"
    R, phi, delta, ahead = expected["4.4a"]
    assert phi + delta == pytest.approx(R) and ahead == pytest.approx(R)
    claimed = re.findall(r'"(not bad|bad)" (?:earns )?(-?\d+)', printed.splitlines()[0])
    assert claimed == [("not bad", f"{world.R['not bad']:.0f}"), ("bad", f"{world.reward[()]['bad']:.0f}")]


# ------------------------------------------------------------------------------------------- text, code and tests agree
TAG = re.compile(r"\((\d+(?:\.\d+)?[a-z]?)\)")


def tags_in_code():
    """{tag: {file: its functions that compute it}}; tags begin lines of a comment, or parts of it behind a semicolon,
    with a formula two spaces further; the line that computes them comes next."""
    found = {}
    for file in [ROOT / "tgdpo.py", *(ROOT / "scripts").glob("*.py")]:
        lines, function = file.read_text().splitlines(), None
        for i, line in enumerate(lines):
            if match := re.match(r"(?:def|class) (\w+)", line):
                function = match[1]
            if not re.match(r"\s*# " + TAG.pattern + "  ", line):
                continue
            below = next(text.strip() for text in lines[i:] if not text.strip().startswith("#"))
            assert below, f"{file.name}: no code below {line.strip()}"
            for tag in re.findall(r"(?:# |;  )" + TAG.pattern + "  ", line):
                found.setdefault(tag, {}).setdefault(file.name, set()).add(function)
    return found


def test_every_tag_stands_in_text_code_and_tests():
    displayed = re.findall(r"\\tag\{(.*?)\}", TEXT)
    assert len(displayed) == len(set(displayed)), "a tag is given twice"
    code = tags_in_code()
    assert set(displayed) == set(code)
    tests = {}  # {test: tags in its docstring}
    for file in (ROOT / "tests").glob("test_*.py"):
        for name, body in re.findall(r'def (test_\w+)\([^)]*\):\n +"""(.*?)"""', file.read_text(), re.S):
            tests[name] = set(TAG.findall(body))
    rows = re.findall(r"^\| \((.*?)\) \| `(.*?)` \| `(\w+)` \| .* \|$", TEXT, re.M)
    assert [row[0] for row in rows] == displayed, "the table lists the tags in the order of the text"
    for tag, functions, test in rows:
        file, _, functions = functions.rpartition(": ")
        file = file.removeprefix("scripts/") or "tgdpo.py"
        assert {*functions.split("`, `")} <= code[tag].get(file, set()), f"({tag}) is not computed in {functions}"
        if "tgdpo.py" in code[tag]:
            got = code[tag]["tgdpo.py"]
            assert {*functions.split("`, `")} == got, f"({tag}): the table does not name {got}"
        assert tag in tests[test], f"({tag}) is not named in the docstring of {test}"


def test_no_tag_is_mentioned_that_does_not_exist():
    displayed = set(re.findall(r"\\tag\{(.*?)\}", TEXT))
    for file in [ROOT / "derivation.md", ROOT / "tgdpo.py", ROOT / "README.md", ROOT / "scripts" / "explain.py"]:
        mentioned = {tag for tag in TAG.findall(file.read_text()) if re.search("[a-z.]", tag)}
        assert mentioned <= displayed, file.name


def test_explain_prints_what_the_derivation_quotes():
    """Words must be the same; numbers may differ in their last digit, as they do between processors."""
    output = subprocess.run(
        [sys.executable, ROOT / "scripts" / "explain.py"], capture_output=True, text=True, check=True
    ).stdout
    quoted = "".join(re.findall(r"^```text\n(.*?)^```$", TEXT, re.M | re.S))
    number = re.compile(r"[-+]?\d*\.\d+")
    assert re.sub(r"\s+", " ", number.sub("#", output)) == re.sub(r"\s+", " ", number.sub("#", quoted))
    for got, want in zip(number.findall(output), number.findall(quoted)):
        assert float(got) == pytest.approx(float(want), abs=2.1 * 10 ** -len(want.split(".")[1])), (got, want)


def test_another_language_can_be_asked_for():
    """Every section runs on any seed, and what is proved holds there: Theorem 4.1, and the identities' two sides."""
    command = [sys.executable, ROOT / "scripts" / "explain.py", "--seed", "7"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    left, right = re.search(r"Theorem 4.1: ([\d.]+) <= ([\d.]+)", output).groups()
    assert float(left) <= float(right)
    for tag in ("4a", "10a"):
        sides = re.search(rf"^\({tag}\).*: (-?[\d.]+) = (-?[\d.]+)$", output, re.M).groups()
        assert float(sides[0]) == pytest.approx(float(sides[1]), abs=2e-4)
    assert len(re.findall(r"^\d+ ", output, re.M)) == 11


def test_the_mathematics_renders_on_github():
    """GitHub's MathJax refuses macros that define or reach outside; Markdown eats * and < inside inline formulas."""
    displays = re.findall(r"^```math\n(.*?)^```$", TEXT, re.M | re.S)
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
    inline = re.findall(r"(?<![\w$])\$([^$\n]+)\$(?![\w$])", prose)
    assert prose.count("$") == 2 * len(inline), "an inline formula is not closed, or touches a letter"
    for formula in displays + inline:
        assert not re.search(r"\\(operatorname|(re)?newcommand|def|require|href|label|(eq)?ref|include)\b", formula)
        assert formula.count("{") == formula.count("}") and formula.count(r"\left") == formula.count(r"\right"), formula
    for formula in inline:
        assert not re.search(r"[*<>]|\\[^a-zA-Z]|\\tag", formula), formula  # Markdown would take the backslash of \,
    for display in displays:
        assert display.count(r"\tag{") == 1 and "\n\n" not in display
