"""Widths under a budget: the optimum against brute force, the bound, and what becomes of a model."""

import itertools
import random

import pytest
import torch

from fdk.errors import FormatError
from fdk.models import QuantisationConfig, quantise, read_overrides
from fdk.models.allocate import allocate
from fdk.models.budget import choose_widths, measure_model, parse_size
from fdk.nn import Linear


def instance(generator, items, options, grid):
    """Random costs and errors; on a coarse grid many sums coincide."""
    costs = [[generator.randint(1, grid) for _ in range(options)] for _ in range(items)]
    errors = [[generator.randint(0, grid) / 8 for _ in range(options)] for _ in range(items)]
    return costs, errors


def layers_like(generator, items):
    """Convex or not, but as layers are: more bytes err less, by about a factor of 4 for every bit."""
    costs, errors = [], []
    for _ in range(items):
        size, power = generator.choice((512, 1024, 2816)), generator.uniform(0.1, 10)
        costs.append([size * bits + 4 * 2**bits for bits in range(1, 9)])
        errors.append([power * 4.0**-bits * generator.uniform(0.7, 1.4) for bits in range(1, 9)])
    return costs, errors


def brute_force(costs, errors, budget):
    """Least error of all choices that fit; None without one."""
    found = None
    for choice in itertools.product(*(range(len(c)) for c in costs)):
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget:
            error = sum(e[i] for e, i in zip(errors, choice, strict=True))
            found = error if found is None else min(found, error)
    return found


def total(table, chosen):
    return sum(row[i] for row, i in zip(table, chosen, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_the_optimum_is_that_of_brute_force(seed):
    generator = random.Random(seed)
    if seed % 2:
        costs, errors = instance(generator, generator.randint(1, 6), generator.randint(1, 4), generator.choice((3, 50)))
    else:
        costs, errors = layers_like(generator, generator.randint(1, 4))
    low, high = sum(map(min, costs)), sum(map(max, costs))
    for budget in {low - 1, low, high, high + 5, *(generator.randint(low, high) for _ in range(6))}:
        found, expected = allocate(costs, errors, budget), brute_force(costs, errors, budget)
        if expected is None:
            assert found is None
            continue
        assert found.exact
        assert found.cost == total(costs, found.chosen) <= budget
        assert found.error == pytest.approx(total(errors, found.chosen), rel=1e-12)
        assert found.error == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert found.bound == found.error


@pytest.mark.parametrize("seed", range(5))
def test_a_large_model_is_solved_exactly_and_the_bound_holds_when_states_run_out(seed):
    generator = random.Random(seed)
    costs, errors = layers_like(generator, 200)
    budget = int(0.4 * sum(map(max, costs)))
    best = allocate(costs, errors, budget)
    assert best.exact
    for states in (1, 7, 100):
        rough = allocate(costs, errors, budget, most_states=states)
        assert rough.cost <= budget
        assert rough.bound <= best.error * (1 + 1e-9)
        assert best.error <= rough.error * (1 + 1e-9)
        # The greedy solution misses the relaxation by one step of one item at most.
        step = max(e[0] - e[-1] for e in errors)
        assert rough.error - rough.bound <= step


def test_more_budget_never_hurts():
    costs, errors = layers_like(random.Random(9), 12)
    low, high = sum(map(min, costs)), sum(map(max, costs))
    found = [allocate(costs, errors, budget).error for budget in range(low, high, (high - low) // 40)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found))


def bits_of(choice):
    return {name: 16 if fmt is None else fmt.bits for name, fmt in choice.formats.items()}


@pytest.mark.parametrize("target", [2.6, 3.3, 5.0])
def test_target_bits_are_kept_and_used(llama, target):
    choice = choose_widths(llama, QuantisationConfig(4, 32), target_bits=target)
    assert target - 0.3 < choice.bits_per_weight <= target
    low = quantise(llama, choice.config)
    assert low.fdk_report.bits_per_weight == pytest.approx(choice.bits_per_weight)
    assert {layer.name: layer.error.format for layer in low.fdk_report.layers} == {
        name: str(fmt) for name, fmt in choice.formats.items()
    }


def test_max_bytes_are_those_of_the_whole_model(llama):
    config = QuantisationConfig(4, 32, codebook="kmeans")
    flat = quantise(llama, config)
    layers = [layer.weight for layer in flat.modules() if isinstance(layer, Linear)]
    size = sum(weight.nbytes for weight in layers)
    kept = ("norm", "embed", "head")
    size += sum(2 * p.numel() for name, p in llama.named_parameters() if any(word in name for word in kept))
    choice = choose_widths(llama, config, max_bytes=size)
    assert choice.nbytes <= size
    assert choice.nbytes > 0.97 * size
    same = choose_widths(llama, config, max_bytes=size, widths=[4])
    assert same.nbytes == size


def test_one_bit_without_calibration_only_where_it_must_be(llama):
    config = QuantisationConfig(4, 32)
    assert 1 not in bits_of(choose_widths(llama, config, target_bits=3.0)).values()
    assert 1 in bits_of(choose_widths(llama, config, target_bits=2.0)).values()
    assert 1 in bits_of(choose_widths(llama, config, target_bits=3.0, widths=[1, 8])).values()


def test_sixteen_keeps_layers_dense(llama):
    choice = choose_widths(llama, QuantisationConfig(4, 32), target_bits=9.0, widths=[2, 16])
    assert set(bits_of(choice).values()) == {2, 16}
    low = quantise(llama, choice.config)
    assert len(low.fdk_report.layers) == list(bits_of(choice).values()).count(2)


def test_overrides_and_skip_go_before_the_budget(llama):
    config = QuantisationConfig(4, 32, skip="lm_head|k_proj", overrides={"v_proj": "int8_g32"})
    chosen = choose_widths(llama, config, target_bits=4.0).formats
    assert {str(fmt) for name, fmt in chosen.items() if "v_proj" in name} == {"int8_g32"}
    assert not [name for name in chosen if "k_proj" in name or "lm_head" in name]


def test_layers_that_merge_are_alike_where_asked(llama, tokens):
    config = QuantisationConfig(4, 32)
    apart = measure_model(llama, config, calibration=tokens)
    choice = apart.together().choose(3.4)
    chosen = bits_of(choice)
    for i in range(2):
        assert len({chosen[f"model.layers.{i}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert chosen[f"model.layers.{i}.mlp.gate_proj"] == chosen[f"model.layers.{i}.mlp.up_proj"]
    assert len(chosen) == 14
    assert choice.bits_per_weight <= 3.4
    # A choice that is less free cannot be better, and it costs what it says.
    assert choice.allocation.error >= apart.choose(3.4).allocation.error - 1e-12
    low = quantise(llama, choice.config)
    assert low.fdk_report.bits_per_weight == pytest.approx(choice.bits_per_weight)
    # What an override fixes is left out of its group.
    fixed = QuantisationConfig(4, 32, overrides={"k_proj": 8})
    chosen = bits_of(choose_widths(llama, fixed, target_bits=4.0, together=True))
    assert {bits for name, bits in chosen.items() if "k_proj" in name} == {8}


@pytest.mark.parametrize("format", ["lut3_g32", "int3_g32"])
def test_the_table_is_saved_in_the_form_that_overrides_have(llama, tmp_path, format):
    choice = choose_widths(llama, QuantisationConfig(format=format), target_bits=4.2)
    path = choice.save(tmp_path / "widths.txt")
    again = QuantisationConfig(format=format, overrides=read_overrides(path))
    low, expected = quantise(llama, again), quantise(llama, choice.config)
    assert [layer.error for layer in low.fdk_report.layers] == [layer.error for layer in expected.fdk_report.layers]
    assert len(list(choice.rows())) == len(choice.layers)


def test_calibration_measures_and_puts_everything_back(llama, tokens):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    holders = {name: p.data_ptr() for name, p in llama.named_parameters()}
    seen = []
    config = QuantisationConfig(4, 32)
    measured = measure_model(llama, config, calibration=tokens, progress=lambda *state: seen.append(state))
    assert [done for _, done, _ in seen] == list(range(1, 15))
    for name, p in llama.named_parameters():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == holders[name]
    # The error of each layer is the divergence of the model that has it alone quantised.
    layer = measured.layers[3]
    name = layer.names[0]
    low = quantise(llama, QuantisationConfig(3, 32, overrides={f"^(?!{name}$)": 16}), dtype=torch.float32)
    with torch.no_grad():
        original, found = llama(tokens).log_softmax(-1).double(), low(tokens).log_softmax(-1).double()
    divergence = (original.exp() * (original - found)).sum(-1).mean().item()
    index = [fmt.bits for fmt in layer.formats].index(3)
    # measure_model stores scales in bfloat16, the comparison in float32.
    assert layer.errors[index] == pytest.approx(divergence, rel=0.05)


def test_calibration_tells_layers_apart_that_weights_cannot(llama, tokens):
    with torch.no_grad():
        # What the first layer's MLP adds to the stream is lost, so its widths do not matter.
        llama.model.layers[0].mlp.down_proj.weight.mul_(1e-6)
    config = QuantisationConfig(4, 32)
    choice = choose_widths(llama, config, target_bits=3.5, calibration=tokens)
    chosen = bits_of(choice)
    without = measure_model(llama, config, calibration=tokens).by_weights().choose(3.5)
    assert without == choose_widths(llama, config, target_bits=3.5)
    assert chosen["model.layers.0.mlp.up_proj"] == chosen["model.layers.0.mlp.gate_proj"] == 1
    assert "nats" in choice.summary


def test_kinds_offer_the_widths_that_they_have(llama):
    choice = choose_widths(llama, QuantisationConfig(format="nf4_g32"), target_bits=5.0)
    assert set(bits_of(choice).values()) == {4}
    sparse = QuantisationConfig(format="int4_g32_sp16of32")
    assert choose_widths(llama, sparse, target_bits=3.5).bits_per_weight == 3.5
    with pytest.raises(FormatError, match="has no width of 3 bits"):
        choose_widths(llama, QuantisationConfig(format="nf4_g32"), target_bits=5.0, widths=[3, 4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of the two"),
        ({"target_bits": 3.0, "max_bytes": 5}, "one of the two"),
        ({"target_bits": 1.2}, "is below 1.5"),
        ({"max_bytes": 1000}, "bytes too small"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_with_the_number(llama, arguments, words):
    with pytest.raises(FormatError, match=words):
        choose_widths(llama, QuantisationConfig(4, 32), **arguments)


def test_nothing_to_choose(llama):
    with pytest.raises(FormatError, match="no layer is quantised"):
        choose_widths(llama, QuantisationConfig(4, 32, skip="proj|head"), target_bits=3.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("7.5 GiB", 15 << 29), ("512mb", 512 * 10**6), ("1234", 1234), (".5KiB", 512)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8 bananas", "-3GB", "0", "GB", "1e9"])
def test_what_is_not_a_size(text):
    with pytest.raises(FormatError, match="not a size"):
        parse_size(text)
