"""The Trajectory Transformer in NumPy and float64: tokens, logits, the loss, and plans by the definition."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mac.types import Batch
from tests.helpers.numpy_transformer import layer_norm, transformer


def token_of(x: float, edges: np.ndarray) -> int:
    """The bin of a number, by counting the thresholds up to it."""
    return int(np.clip(sum(edge <= x for edge in edges) - 1, 0, len(edges) - 2))


def middle(token: int, edges: np.ndarray) -> float:
    token = min(token, len(edges) - 2)
    return (edges[token] + edges[token + 1]) / 2


def outputs(model: Any, sequence: list[int]) -> np.ndarray:
    """Outputs of the model for a sequence of tokens that begins with a transition."""
    dims, _, size = model.heads.shape
    x = np.zeros((len(sequence), model.token.shape[1]))
    for i, token in enumerate(sequence):
        row = -1 if token == size - 1 else (i % dims) * (size - 1) + token
        x[i] = model.token[row] + model.position[i]
    hidden = np.arange(len(sequence)) % dims == dims - 1
    return layer_norm(transformer(model.blocks, x[None], hidden)[0], model.norm)


def next_logits(model: Any, sequence: list[int]) -> np.ndarray:
    """Logits of the token that follows on a sequence."""
    return outputs(model, sequence)[-1] @ model.heads[len(sequence) % len(model.heads)]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sequences(target: np.ndarray, batch: Batch) -> np.ndarray:
    """Tokens `[B, H, K]` of a batch."""
    assert batch.states is not None and batch.rewards is not None
    assert batch.return_to_go is not None and batch.valid is not None
    count, window, _ = batch.states.shape
    tokens = np.full((count, window, len(target)), target.shape[1] - 1)
    for b in range(count):
        state = np.asarray(batch.obs[b])
        for t in range(window):
            after = batch.return_to_go[b, t + 1]
            numbers = [*state, *batch.actions[b, t], batch.rewards[b, t], after]
            if batch.valid[b, t]:
                tokens[b, t] = [token_of(float(x), edges) for x, edges in zip(numbers, target, strict=True)]
            state = np.asarray(batch.states[b, t])
    return tokens


def tt(nets: Any, frozen: Any, target: Any, d: Any, cfg: Any, key: Any, batch: Batch) -> dict[str, float]:
    """The loss, one token at a time."""
    tokens, model = sequences(target, batch), nets.model
    assert batch.valid is not None and batch.masks is not None
    count, window, dims = tokens.shape
    width, total = batch.obs.shape[1], 0.0
    for b in range(count):
        inside = [t for t in range(window) if batch.valid[b, t]]
        ended = batch.masks[b, inside[-1]] == 0
        sequence = tokens[b].reshape(-1).tolist()
        y = outputs(model, sequence[:-1])
        for i, token in enumerate(sequence[1:], start=1):
            t, dim = divmod(i, dims)
            if t in inside or ended:
                weight = cfg.action_weight if width <= dim < dims - 2 else 1.0
                total -= weight * np.log(softmax(y[i - 1] @ model.heads[dim])[token])
    return {"model": total / (count * (window * dims - 1))}


def greedy_actions(model: Any, target: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Most probable actions at the start of an episode, one entry after the other."""
    width = s.shape[1]
    actions = []
    for state in s:
        sequence = [
            token_of(float(np.float32(x)), edges) for x, edges in zip(state, target[:width], strict=True)
        ]
        for _ in range(len(target) - width - 2):
            sequence.append(int(next_logits(model, sequence).argmax()))
        chosen = zip(sequence[width:], target[width:-2], strict=True)
        actions.append([middle(token, edges) for token, edges in chosen])
    return np.asarray(actions)


def score_of(
    model: Any,
    target: np.ndarray,
    context: int,
    past: list[list[int]],
    state: list[int],
    plan: Sequence[tuple[int, ...]],
    gamma: float,
) -> float:
    """Expected return of the actions `plan`, whose states are the most probable ones.

    Args:
        context: transitions that the model sees, the present one included.
        past: tokens of the real transitions before the state, the newest last.
        state: tokens of the present state.
        plan: tokens of each action.
    """
    dims, paid, past, ahead = len(target), 0.0, [list(step) for step in past], 0.0
    middles = (target[:, :-1] + target[:, 1:]) / 2
    for t, action in enumerate(plan):
        before = [token for step in past[-(context - 1) :] for token in step]
        if t:
            state = []
            for _ in range(dims - 2 - len(action)):
                state.append(int(next_logits(model, before + state).argmax()))
        step = [*state, *action]
        probs = softmax(next_logits(model, before + step))
        paid += gamma**t * float(probs[:-1] @ middles[-2])
        step.append(int(probs.argmax()))
        probs = softmax(next_logits(model, before + step))
        ahead = gamma ** (t + 1) * float(probs[:-1] @ middles[-1])
        past.append([*step, int(probs.argmax())])
    return paid + ahead
