"""ExFlow, aggregated (arXiv 2401.08383): experts that follow each other go to one device.

Minimises the price of hops from layer to layer, each layer's experts in equal parts; loads are not
looked at, so balance is what falls out of it. One replica of each expert. The original keeps one
column per token; counting transitions first gives the same objective in E² numbers per layer.

Knows transition counts and hop prices. Knows nothing of loads, replicas, steps or dispatch.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from ...foundation.arrays import FloatArray, IntArray
from .whole_model import LayersDone, PlacedModel, WholeModel, slots_of

STARTS = {"fast": 1, "normal": 2, "thorough": 8}
MOST_SWEEPS = {"fast": 2, "normal": 8, "thorough": 50}
LEAST_GAIN = 1e-3           # of the price, by a sweep worth repeating


def affinity(model: WholeModel, done: LayersDone) -> PlacedModel:
    """Slots of all layers with few and short hops from layer to layer.

    minimise  sum_l sum_{e,f} transitions[l][e, f] · hop[device of e in l, device of f in l + 1]
    with at most ceil(E · slots_g / S) experts of a layer on device g. With its neighbours fixed one
    layer is an assignment problem, solved exactly; layers are swept forth and back until a sweep
    gains little, from several starts. The best start wins, ties to the earlier one.
    """
    assigned_G = -(-model.experts * model.slots_G // int(model.slots_G.sum()))
    assigned_device = np.repeat(np.arange(len(assigned_G)), assigned_G)
    rng = np.random.default_rng([model.seed, 5])
    best_LE, best_price, truncated = None, np.inf, False
    for start in range(STARTS[model.effort]):
        if best_LE is not None and model.expired():
            truncated = True
            break
        first_E = np.sort(assigned_device[: model.experts])
        if start > 0:
            first_E = rng.permutation(assigned_device)[: model.experts]
        device_LE = _forward(model, first_E, assigned_device, done)
        price, sweeps = _price(model, device_LE), 0
        while sweeps < MOST_SWEEPS[model.effort] and not model.expired():
            _sweep(model, device_LE, assigned_device)
            before, price = price, _price(model, device_LE)
            sweeps += 1
            if before - price <= LEAST_GAIN * before:
                break
        truncated = truncated or model.expired()
        if price < best_price:
            best_LE, best_price = device_LE, price
    assert best_LE is not None
    hops = float(model.transition_LEE.sum())
    stay = 1.0 - _moved(model, best_LE) / hops if hops > 0 else 1.0
    notes = (f"affinity: {stay:.1%} of the ways from layer to layer stay on their device",)
    return PlacedModel(slots_of(best_LE, model.slots_G), notes, truncated)


def _forward(
    model: WholeModel, first_E: IntArray, assigned_device: IntArray, done: LayersDone
) -> IntArray:
    """Layer after layer, each placed for the one before it."""
    layers = len(model.load_LE)
    device_LE = np.tile(first_E, (layers, 1))
    done(1, 0.0)
    for layer in range(1, layers):
        transition_cost_EG = _transition_cost_in(model, device_LE, layer)
        device_LE[layer] = _seated(transition_cost_EG, assigned_device)
        done(layer + 1, 0.0)
    return device_LE


def _sweep(model: WholeModel, device_LE: IntArray, assigned_device: IntArray) -> None:
    """Re-seat every layer between its neighbours, back and then forth. Changes device_LE."""
    layers = len(device_LE)
    for layer in (*range(layers - 2, -1, -1), *range(1, layers)):
        if model.expired():
            return
        transition_cost_EG = np.zeros((model.experts, len(model.slots_G)))
        if layer > 0:
            transition_cost_EG += _transition_cost_in(model, device_LE, layer)
        if layer < layers - 1:
            next_EG = _one_hot(device_LE[layer + 1], len(model.slots_G))
            transition_cost_EG += model.transition_LEE[layer] @ next_EG @ model.transition_GG.T
        device_LE[layer] = _seated(transition_cost_EG, assigned_device)


def _transition_cost_in(model: WholeModel, device_LE: IntArray, layer: int) -> FloatArray:
    """[E, G] price of the hops into each expert of a layer, were it on device g."""
    before_EG = _one_hot(device_LE[layer - 1], len(model.slots_G))
    sent_EG = model.transition_LEE[layer - 1].T @ before_EG
    transition_cost: FloatArray = sent_EG @ model.transition_GG
    return transition_cost


def _one_hot(device_E: IntArray, devices: int) -> FloatArray:
    return np.eye(devices)[device_E]


def _seated(transition_cost_EG: FloatArray, assigned_device: IntArray) -> IntArray:
    """[E] device of each expert at the least toll."""
    _, assigned_E = linear_sum_assignment(transition_cost_EG[:, assigned_device])
    return np.asarray(assigned_device[assigned_E], np.int64)


def _price(model: WholeModel, device_LE: IntArray) -> float:
    hops = zip(model.transition_LEE, device_LE[:-1], device_LE[1:], strict=True)
    return float(sum((pairs * model.transition_GG[np.ix_(a, b)]).sum() for pairs, a, b in hops))


def _moved(model: WholeModel, device_LE: IntArray) -> float:
    """Transitions that change device."""
    hops = zip(model.transition_LEE, device_LE[:-1], device_LE[1:], strict=True)
    return float(sum(pairs[a[:, None] != b].sum() for pairs, a, b in hops))
